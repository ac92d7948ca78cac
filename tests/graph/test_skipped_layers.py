"""A memory layer and the layers that it skips need nothing of each other, so any order of them is the same model."""

from dataclasses import replace

import pytest
from exported import CONFIG, MEMORY, build

from ultramem.export.program import capture, simplify


def modules_of(node) -> set[str]:
    return {path.removeprefix("model.") for path, _ in node.meta.get("nn_module_stack", {}).values()}


def inside(node, *prefixes) -> bool:
    return any(f"{path}.".startswith(f"{prefix}.") for path in modules_of(node) for prefix in prefixes)


def before(nodes) -> set:
    """Everything that the nodes depend on."""
    seen, waiting = set(), list(nodes)
    while waiting:
        for each in waiting.pop().all_input_nodes:
            if each not in seen:
                seen.add(each)
                waiting.append(each)
    return seen


@pytest.mark.parametrize("insertions", ["1:3", "1:2/2:3"])
def test_neither_waits_for_the_other(insertions):
    config = replace(CONFIG, num_layers=3, insertions=insertions, memory=replace(MEMORY, num_layers=3))
    graph = simplify(capture(build(config), seq=1)).exported.graph
    calls = [node for node in graph.nodes if node.op == "call_function"]
    for index, (source, target) in enumerate(config.parsed_insertions):
        memory = [node for node in calls if inside(node, f"memories.{index}")]
        skipped = [f"blocks.{source - 1}.mlp", *(f"blocks.{number - 1}" for number in range(source + 1, target + 1))]
        layers = [node for node in calls if inside(node, *skipped)]
        assert any("lookup_reduce" in str(node.target) for node in memory)
        assert len(layers) > 10
        assert before(memory).isdisjoint(layers)
        assert before(layers).isdisjoint(memory)
        place = {node: number for number, node in enumerate(graph.nodes)}
        assert max(map(place.get, memory)) < min(map(place.get, layers))  # as captured, the memory comes first
