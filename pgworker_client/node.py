"""Trees as data: `Node`, and the JSON that ``add_job_tree`` and ``add_children`` take, written from nodes or dicts.

Nothing is checked here that the database checks: it names the place, such as ``tree.children[1].after``, in its error.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Union, Unpack

from pgworker_client.enqueue import JobOptions, plain_spec, refuse_unknown
from pgworker_client.job import to_json

Policy = Literal["fail-parent", "ignore", "remove"]

#: A node as a dict may be used wherever a `Node` may: its keys are those of the SQL function.
NodeLike = Union["Node", Mapping[str, Any]]


class Node:
    """A job of a tree, with the jobs below it. It is nothing but data: `add_job_tree` adds it.

    Args:
        identifier: the task that is to handle it.
        payload: anything that JSON can hold; None stands for ``{}``.
        name: unique among its siblings, for ``after`` and for whoever reads the results.
        children: the nodes below; the job runs when all of them have finished.
        after: siblings, or their names: this node and everything below it start when those have finished.
        on_failure: what becomes of the parent when this job fails for good: ``fail-parent`` (the default), ``ignore``,
            ``remove``.
        compensate: the job that undoes what this one did when the tree fails for good, a `Node` or a dict: identifier,
            payload, queue_name, max_attempts, priority, flags. Its payload also gets the ``node`` that it is to undo.
        **options: as in `add_job`.
    """

    __slots__ = ("after", "children", "fields")

    def __init__(
        self,
        identifier: str,
        payload: Any = None,
        *,
        name: str | None = None,
        children: Iterable[NodeLike] = (),
        after: Iterable[Node | str] = (),
        on_failure: Policy | None = None,
        compensate: NodeLike | None = None,
        **options: Unpack[JobOptions],
    ) -> None:
        refuse_unknown("Node", options, "name", "children", "after", "on_failure", "compensate")
        self.children: list[NodeLike] = _listed("children", children, identifier)
        self.after: list[Node | str] = _listed("after", after, identifier)
        given = {"identifier": identifier, "payload": payload, "name": name, "on_failure": on_failure}
        given |= {"compensate": compensate, **options}
        #: What is said of the job itself, by the names that the database knows; what is None is left out.
        self.fields: dict[str, Any] = {key: value for key, value in given.items() if value is not None}

    def __repr__(self) -> str:
        name = f", name={self.fields['name']!r}" if "name" in self.fields else ""
        below = f", {len(self.children)} children" if self.children else ""
        return f"<Node {self.fields.get('identifier')!r}{name}{below}>"

    def to_json(self) -> str:
        """The tree as the JSON text that ``pgworker.add_job_tree`` takes, for other drivers than psycopg."""
        return tree_json(self, "tree")


def tree_json(tree: NodeLike, where: str) -> str:
    """The JSON text of a tree; ``where`` is what errors call it. TypeError or ValueError for what cannot be written."""
    return _write([_Place(where, tree, set())])


def nodes_json(nodes: Iterable[NodeLike], where: str) -> str:
    """The JSON text of an array of nodes that are siblings; TypeError for what is no list of them."""
    return "[" + _write(_places(_listed(where, nodes), where)) + "]"


def _listed(what: str, values: Any, identifier: str | None = None) -> list[Any]:
    """The values as a list, for a generator can be gone through only once; TypeError for what is not several."""
    if not isinstance(values, Iterable) or isinstance(values, (str, bytes, Mapping)):
        of_node = "" if identifier is None else f" of node {identifier!r}"
        raise TypeError(f"{what}{of_node} must be a list, not {values!r}")
    return list(values)


class _Place(NamedTuple):
    """A node that is still to be written: what errors call it, and the ids of the nodes beside it."""

    where: str
    node: Any
    siblings: set[int]


class _End(NamedTuple):
    """All children of that node are written."""

    node: int


def _places(nodes: Sequence[Any], where: str) -> list[_Place | _End | str]:
    siblings = {id(node) for node in nodes}
    places: list[_Place | _End | str] = []
    for index, node in enumerate(nodes):
        places += ["," if index else "", _Place(f"{where}[{index}]", node, siblings)]
    return places


def _write(first: list[_Place | _End | str]) -> str:
    # With a stack of its own: json's encoder gives up at a depth of a few hundred nodes, PostgreSQL at thousands.
    written: list[str] = []
    stack, open_nodes = first[::-1], set[int]()
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            written.append(item)
            continue
        if isinstance(item, _End):
            written.append("]}")
            open_nodes.remove(item.node)
            continue
        own, children = _parts(item)
        text = to_json(item.where, own)
        if not children:
            written.append(text)
            continue
        node = id(item.node)
        if node in open_nodes:
            raise ValueError(f"{item.where} is a node that contains itself")
        open_nodes.add(node)
        written.append(f'{text[:-1]}{"," if own else ""}"children":[')
        stack.append(_End(node))
        stack += _places(children, f"{item.where}.children")[::-1]
    return "".join(written)


def _parts(place: _Place) -> tuple[Any, Sequence[Any]]:
    """What is said of the node itself, and its children. What is no node at all is left for the database to refuse."""
    where, node, siblings = place
    if isinstance(node, Node):
        own, children, after = node.fields, node.children, node.after
    elif isinstance(node, Mapping):
        own, children, after = {**node}, node.get("children", ()), node.get("after", ())
        if not isinstance(children, (list, tuple)) or not isinstance(after, (list, tuple)):
            return own, ()
        own.pop("children", None)
        own.pop("after", None)
    else:
        return node, ()
    own = plain_spec(own, where + ".")
    undo = own.get("compensate")
    if isinstance(undo, Node):
        if undo.children or undo.after:
            raise ValueError(f"{where}.compensate: {undo!r} is one job: it can have neither children nor after")
        undo = undo.fields
    if isinstance(undo, Mapping):
        own["compensate"] = plain_spec(undo, f"{where}.compensate.")
    if after:
        own["after"] = [_name(one, f"{where}.after[{index}]", siblings) for index, one in enumerate(after)]
    return own, children


def _name(after: Any, where: str, siblings: set[int]) -> Any:
    """What ``after`` says in JSON: a name, which for a node must be one that this node has as a sibling."""
    if not isinstance(after, Node):
        return after
    if id(after) not in siblings:
        raise ValueError(f"{where}: {after!r} is not a sibling of this node")
    if "name" not in after.fields:
        raise ValueError(f"{where}: {after!r} has no name: give it one")
    return after.fields["name"]
