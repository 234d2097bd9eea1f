"""The jobs of the model in tree_model.py: what is known of each, and who is whose."""

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


class Forest(dict[int, Node]):
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
