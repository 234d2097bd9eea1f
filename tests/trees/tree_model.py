"""What a tree of jobs is meant to do, in 80 lines without counters or locks: who waits looks who is live."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

Stop = tuple[str, int | None, int | None]  # how a job ended, because of which other one, and whom its error names


@dataclass
class Node:
    id: int
    parent: int | None
    depth: int
    policy: str
    most: int  # attempts
    after: set[int] = field(default_factory=set)
    ended: Stop = ("live", None, None)
    stop: Stop | None = None  # how it is to end
    holder: int | None = None
    attempts: int = 0
    waits: bool = True  # for its children, as far as there are any
    gates: set[int] = field(default_factory=set)  # those of after that are to finish first
    gated: bool = True  # these were not all done yet when nothing above held it back
    held: bool = True  # by its own gates or by those above
    state = property(lambda node: node.ended[0])
    badly = property(lambda node: node.state in ("failed", "cancelled"))
    because = property(lambda node: node.ended[1] or node.id)


class Trees(dict[int, Node]):
    def nodes(self, wanted: Callable[[Node], object]) -> list[Node]:
        return [node for _, node in sorted(self.items()) if node.state != "gone" and wanted(node)]

    def live(self, ids: Iterable[int | None]) -> list[Node]:
        return self.nodes(lambda node: node.state == "live" and node.id in ids)

    def children(self, id: int) -> list[Node]:
        return self.nodes(lambda node: node.parent == id)

    def followers(self, id: int) -> list[Node]:
        return self.nodes(lambda node: id in node.after)

    def all(self, step: Callable[[int], list[Node]], id: int) -> set[int]:
        return {found for node in step(id) for found in (node.id, *self.all(step, node.id))}

    def seen(self, node: Node) -> str:
        live = "running" if node.holder else "waiting" if node.waits else "ready"
        return live if node.state == "live" else node.state

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
        for id in ids:  # and what ended badly below, and all that did so because of any of these
            ids += [child.id for child in self.children(id) if child.badly and child.id not in ids]
        ids += [node.id for node in self.nodes(lambda node: node.badly and node.ended[1] in ids) if node.id not in ids]
        for node in [self[id] for id in ids]:
            self[node.id] = Node(node.id, node.parent, node.depth, node.policy, node.most, node.after)
        for node in self.live(self):
            node.stop = None if node.stop and node.stop[1] in ids else node.stop
            if node.id in ids:
                node.gates = {other.id for other in self.live(node.after)}
                node.gated = bool(node.gates)
            elif node.gated:
                node.gates |= node.after & set(ids)
