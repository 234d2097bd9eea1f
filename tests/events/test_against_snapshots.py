"""Whatever is done to jobs, what is told of it leads from the states before to the states after, step by step.

PGWORKER_MODEL_EXAMPLES sets how many random histories are tried; without it a few, always the same ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

from tests.calling import Conn
from tests.connections import Connections
from tests.events.witness import Witness, publish
from tests.histories import histories, patience
from tests.model.test_against_model import Queue
from tests.trees.test_tree_model import Forest, Spec, Step, families, kinds, picks

OFTEN = histories(14, stateful_step_count=50)


class WatchedQueue(Queue):
    """The machine that plays with a queue, each of its calls watched."""

    def __init__(self, connections: list[Conn], witness: Witness) -> None:
        super().__init__(connections)
        self.witness = witness

    def call(self, query: str, *parameters: Any, by: int | None = None) -> list[tuple[Any, ...]]:
        conn = self.connections[0]
        conn.execute("select set_config('pgworker.fake_now', %s, false)", [self._time(self.model.now + 1_000)])
        with self.witness.compares(conn):
            return super().call(query, *parameters, by=by)


@patience(120)
def test_no_history_of_a_queue_is_told_otherwise_than_it_was(connect: Connections) -> None:
    connections = [connect() for _ in range(2)]
    publish(connections[0])
    witness = Witness(connect())
    make: Callable[[], RuleBasedStateMachine] = lambda: WatchedQueue(connections, witness)  # noqa: E731
    run_state_machine_as_test(make, settings=OFTEN)  # type: ignore[arg-type]


@patience(120)
def test_no_history_of_trees_is_told_otherwise_than_it_was(connect: Connections) -> None:
    conn = connect()
    publish(conn)
    witness = Witness(connect())

    @OFTEN
    @given(
        families=st.lists(families, min_size=1, max_size=2),
        steps=st.lists(st.tuples(kinds, picks, picks), min_size=20, max_size=50),
    )
    def compare(families: list[list[Spec]], steps: list[Step]) -> None:
        forest = Forest(conn, families)
        witness.payloads(conn)
        for step in steps:
            with witness.compares(conn, timeless=True):
                forest.step(*step)

    compare()
