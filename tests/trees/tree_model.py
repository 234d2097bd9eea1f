"""What a tree of jobs is meant to do, in 80 lines without counters or locks: who waits looks who is live."""

from collections.abc import Iterable

from tests.trees.forest import Forest, Node


class Trees(Forest):
    def settle(self) -> None:
        for node in self.live(self):
            above = any(parent.held for parent in self.live([node.parent]))
            node.gated = node.gated and bool(node.gates or above)
            node.held = node.gated or above
            node.waits = node.waits and (node.held or any(c.state == "live" for c in self.children(node.id)))

    def end(self, states: dict[int, str], cause: int | None = None, named: int | None = None) -> None:
        """End these at once, and then, level by level upwards, whatever follows from it."""
        lets_go = {id for id, state in states.items() if self[id].holder and state == "completed" and not self[id].stop}
        for node in self.live(states):
            gone = states[node.id] == "gone"
            node.ended = node.stop if node.stop and not gone else (states[node.id], cause, named)
            node.holder = None
        rest = set(states)
        while rest:
            depth = max(self[id].depth for id in rest)
            level = [self[id] for id in sorted(rest) if self[id].depth == depth]
            rest -= {node.id for node in level}
            parents = self.live({node.parent for node in level})
            for node in level:
                fails = node.state != "completed" and node.policy == "fail-parent"
                if node.id not in lets_go:
                    self.stop(self.all(self.children, node.id), node.because, node.ended[2])
                if fails and self[node.parent or node.id] not in parents:  # who would fail, and take them along
                    behind = self.live(self.all(self.followers, node.id))
                    self.stop([other.id for other in behind if not other.holder], node.because, node.ended[2])
                for follower in self.followers(node.id) if not fails else []:
                    follower.gates.discard(node.id)
                for parent in self.live([node.parent]) if fails else []:
                    if parent.holder:
                        parent.stop = parent.stop or ("failed", node.because, node.id)
                    else:
                        parent.ended = ("failed", node.because, node.id)
                        rest.add(parent.id)
            for node in level:
                removed = node.state != "completed" and node.policy == "remove"
                if removed or node.state == "gone" or self[node.parent or node.id].state == "gone":
                    self.forget(node.id)

    def stop(self, ids: Iterable[int], cause: int | None, named: int | None) -> None:
        running = [node for node in self.live(ids) if node.holder]
        for node in running:
            node.stop = node.stop or ("cancelled", cause, named)
        self.end({node.id: "cancelled" for node in self.live(ids) if not node.holder}, cause, named)

    def forget(self, id: int) -> None:
        for child in self.children(id):
            if child.state != "live":
                self.forget(child.id)
        self[id].ended = ("gone", None, None)

    def retry(self, ids: list[int]) -> None:
        ids = [id for id in ids if self[id].badly]
        caused, more = list[int](), ids
        while more:  # and what ended badly below, because of any of these, or else had made parents fail
            ids += [id for id in more if id not in ids]
            for id in ids:
                ids += [child.id for child in self.children(id) if child.badly and child.id not in ids]
            caused = [node.id for node in self.nodes(lambda node: node.badly) if node.ended[1] in ids]
            fatal = [child for id in caused for child in self.children(id) if child.policy == "fail-parent"]
            more = [child.id for child in fatal if child.badly and child.id not in ids + caused]
        ids += [id for id in caused if id not in ids]
        for node in [self[id] for id in ids]:
            self[node.id] = Node(node.id, node.parent, node.depth, node.policy, node.most, node.after)
        for node in self.live(self):
            node.stop = None if node.stop and node.stop[1] in ids else node.stop
            if node.id in ids:
                node.gates = {other.id for other in self.live(node.after)}
                node.gated = bool(node.gates)
            elif node.gated:
                node.gates |= node.after & set(ids)
