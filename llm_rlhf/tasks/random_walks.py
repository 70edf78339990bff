"""Random walks: find the shortest way through a graph that is known only from aimless walks.

After the toy task of Decision Transformer (Chen 2021, 2106.01345, section 3) as trlX sets it up: 21 nodes, an edge
between any ordered pair with probability 0.1, every node with a way out, node 0 the goal and absorbing. Walks have
at most 10 nodes and stop at the goal. Most fail, and the failures are kept. The optimality of a walk is

    (10 - its nodes) / (10 - nodes of the shortest way)

with 10 nodes for a walk that takes a missing edge or does not arrive: 1 for a shortest way, 0 for a failure.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llm_rlhf.tasks.examples import Example

GOAL = 0
LETTERS = "abcdefghijklmnopqrstuvwxyz"
ATTEMPTS = 10_000


@dataclass(frozen=True)
class RandomWalksConfig:
    """nodes, edge_probability: of the graph; max_nodes: of a walk; walks: demonstrations;
    held_out_starts: share of the starting nodes that reinforcement learning is never prompted with."""

    nodes: int = 21
    edge_probability: float = 0.1
    max_nodes: int = 10
    walks: int = 1000
    held_out_starts: float = 0.3

    def __post_init__(self) -> None:
        if not 3 <= self.nodes <= len(LETTERS):
            raise ValueError(f"task.random_walks.nodes must be 3 to {len(LETTERS)}: nodes are letters")
        if not 0 < self.edge_probability < 1 or not 0 < self.held_out_starts < 1:
            raise ValueError("task.random_walks: edge_probability and held_out_starts lie between 0 and 1")
        if self.max_nodes < 3 or self.walks < 1:
            raise ValueError("task.random_walks: max_nodes must be at least 3 and walks at least 1")


@dataclass(frozen=True)
class Graph:
    """successors: node -> nodes it leads to; distance: node -> nodes on the shortest way to the goal, both ends
    counted, None where there is no way."""

    successors: tuple[tuple[int, ...], ...]
    distance: tuple[int | None, ...]

    @classmethod
    def from_successors(cls, successors: Sequence[Sequence[int]]) -> Graph:
        """Find the shortest ways by breadth-first search backwards from the goal."""
        predecessors: list[list[int]] = [[] for _ in successors]
        for node, following in enumerate(successors):
            for successor in following:
                predecessors[successor].append(node)
        distance: list[int | None] = [None] * len(successors)
        distance[GOAL] = 1
        queue = deque([GOAL])
        while queue:
            node = queue.popleft()
            here = distance[node]
            assert here is not None
            for before in predecessors[node]:
                if distance[before] is None:
                    distance[before] = here + 1
                    queue.append(before)
        return cls(tuple(tuple(sorted(following)) for following in successors), tuple(distance))

    def optimality(self, walk: str, *, max_nodes: int) -> float:
        """See the module. 0 for an empty walk, or one from where the goal cannot be reached in time."""
        nodes = [LETTERS.find(letter) for letter in walk]
        if not nodes or not 0 <= nodes[0] < len(self.successors):
            return 0.0
        shortest = self.distance[nodes[0]]
        if shortest is None or shortest >= max_nodes:
            return 0.0
        for position, node in enumerate(nodes):
            if position > 0 and node not in self.successors[nodes[position - 1]]:
                break
            if node == GOAL:
                return (max_nodes - min(position + 1, max_nodes)) / (max_nodes - shortest)
        return 0.0


def random_graph(config: RandomWalksConfig, rng: random.Random) -> Graph:
    """Draw graphs until every node has a way out and at least two starts can reach the goal in time.

    Raises ValueError if the edge probability makes that hopeless.
    """
    for _ in range(ATTEMPTS):
        successors = [
            [other for other in range(config.nodes) if other != node and rng.random() < config.edge_probability]
            for node in range(config.nodes)
        ]
        if not all(successors):
            continue
        successors[GOAL] = [GOAL]
        graph = Graph.from_successors(successors)
        if len(starts(graph, config)) >= 2:
            return graph
    raise ValueError(
        f"task.random_walks: no usable graph in {ATTEMPTS} draws; raise edge_probability "
        f"(now {config.edge_probability})"
    )


def starts(graph: Graph, config: RandomWalksConfig) -> list[int]:
    """Nodes other than the goal that can reach it in fewer than max_nodes nodes."""
    return [
        node
        for node, distance in enumerate(graph.distance)
        if node != GOAL and distance is not None and distance < config.max_nodes
    ]


def random_walk(graph: Graph, config: RandomWalksConfig, rng: random.Random) -> str:
    """A walk from a random node that chooses its way blindly."""
    node = rng.randrange(1, len(graph.successors))
    walk = LETTERS[node]
    while node != GOAL and len(walk) < config.max_nodes:
        node = rng.choice(graph.successors[node])
        walk += LETTERS[node]
    return walk


def build(config: RandomWalksConfig, *, seed: int) -> dict[str, Any]:
    """The parts of the task; see `task.Task`. Splits: "prompted" starts, and the others as "test" and "validation".

    There are about twenty starts in all, so the validation prompts are the prompted ones.
    """
    rng = random.Random(f"random walks {seed}")
    graph = random_graph(config, rng)
    walks = [random_walk(graph, config, rng) for _ in range(config.walks)]

    def optimality(prompts: list[str], completions: list[str]) -> list[float | None]:
        """How near to the shortest way the walk (prompt and completion) is; the task of this run."""
        return [
            graph.optimality(prompt + completion, max_nodes=config.max_nodes)
            for prompt, completion in zip(prompts, completions, strict=True)
        ]

    usable = starts(graph, config)
    rng.shuffle(usable)
    count = max(1, round(config.held_out_starts * len(usable)))
    held_out, prompted = sorted(usable[:count]), sorted(usable[count:])
    train = [Example(LETTERS[node], "") for node in prompted]
    arrived = sum(walk.endswith(LETTERS[GOAL]) for walk in walks)
    return {
        "demonstrations": [Example(walk[0], walk[1:]) for walk in walks],
        "train": train,
        "splits": {
            "validation": train,
            "prompted": train,
            "test": [Example(LETTERS[node], "") for node in held_out],
        },
        "rewards": {"optimality": optimality},
        "gold": {"optimality": 1.0},
        "max_new_tokens": config.max_nodes,
        "limited_by": "task.random_walks.max_nodes",
        "alphabet": LETTERS[: config.nodes],
        "notes": [
            f"random walks: {config.nodes} nodes, {len(walks)} walks of which {arrived} arrive, "
            f"{len(prompted)} prompted starts, {len(held_out)} held out"
        ],
    }
