import itertools
import random

import pytest

from llm_rlhf.tasks.random_walks import (
    GOAL,
    LETTERS,
    Graph,
    RandomWalksConfig,
    random_graph,
    random_walk,
    starts,
)
from llm_rlhf.tasks.task import TaskConfig, build_task

# a is the goal. b -> c -> a, d -> b, and b -> d back; e -> e only.
SMALL = Graph.from_successors([[0], [2, 3], [0], [1], [4]])


def test_shortest_ways_by_hand() -> None:
    assert SMALL.distance == (1, 3, 2, 4, None)


@pytest.mark.parametrize(
    "walk, expected",
    [
        ("bca", 1.0),  # 3 nodes, the shortest: (10 - 3) / (10 - 3)
        ("ca", 1.0),  # (10 - 2) / (10 - 2)
        ("dbca", 1.0),
        ("bdbca", (10 - 5) / (10 - 3)),
        ("dbdbca", (10 - 6) / (10 - 4)),
        ("bcab", 1.0),  # it has arrived; what follows is not looked at
        ("ba", 0.0),  # no such edge
        ("bdc", 0.0),  # nor here
        ("bc", 0.0),  # not there yet
        ("bdbdbdbdbca", 0.0),  # 11 nodes
        ("e", 0.0),  # no way
        ("", 0.0),
        ("zca", 0.0),
        ("b!a", 0.0),
    ],
)
def test_optimality_by_hand(walk: str, expected: float) -> None:
    assert SMALL.optimality(walk, max_nodes=10) == pytest.approx(expected)


def test_graphs_have_trlxs_properties() -> None:
    config = RandomWalksConfig()
    edges = 0
    for seed in range(20):
        graph = random_graph(config, random.Random(seed))
        assert len(graph.successors) == 21
        assert graph.successors[GOAL] == (GOAL,)
        for node in range(1, 21):
            assert graph.successors[node]
            assert node not in graph.successors[node]
        edges += sum(len(following) for following in graph.successors[1:])
        assert all(graph.distance[node] is not None for node in starts(graph, config))
    assert 0.09 < edges / (20 * 20 * 20) < 0.15  # 0.1, raised by the condition that there is a way out


def test_walks_follow_edges_and_stop_at_the_goal() -> None:
    config = RandomWalksConfig()
    rng = random.Random(0)
    graph = random_graph(config, rng)
    walks = [random_walk(graph, config, rng) for _ in range(300)]
    for walk in walks:
        nodes = [LETTERS.index(letter) for letter in walk]
        assert 2 <= len(nodes) <= 10
        assert nodes[0] != GOAL
        assert GOAL not in nodes[:-1]
        assert all(b in graph.successors[a] for a, b in itertools.pairwise(nodes))
        assert len(nodes) == 10 or nodes[-1] == GOAL
    assert {walk[0] for walk in walks} == set(LETTERS[1:21])
    assert any(walk[-1] != "a" for walk in walks)


def test_task_parts() -> None:
    task = build_task(TaskConfig(name="random_walks", seed=7))
    assert task.demonstrations == build_task(TaskConfig(name="random_walks", seed=7)).demonstrations
    assert task.demonstrations != build_task(TaskConfig(name="random_walks", seed=8)).demonstrations
    prompted = {example.prompt for example in task.train}
    held_out = {example.prompt for example in task.splits["test"]}
    assert not prompted & held_out
    assert "a" not in prompted | held_out
    assert len(held_out) == round(0.3 * (len(prompted) + len(held_out)))
    assert {example.prompt for example in task.demonstrations} >= held_out
    assert max(len(example.completion) + 1 for example in task.demonstrations) == task.max_new_tokens
    optimality = task.rewards["optimality"]
    scores = optimality(
        prompts=[example.prompt for example in task.demonstrations],
        completions=[example.completion for example in task.demonstrations],
    )
    assert 0.1 < sum(score or 0.0 for score in scores) / len(scores) < 0.6
    assert max(score or 0.0 for score in scores) == 1.0


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="letters"):
        RandomWalksConfig(nodes=27)
    with pytest.raises(ValueError, match="edge_probability"):
        RandomWalksConfig(edge_probability=0.0)
    with pytest.raises(ValueError, match="raise edge_probability"):
        random_graph(RandomWalksConfig(edge_probability=0.001), random.Random(0))
