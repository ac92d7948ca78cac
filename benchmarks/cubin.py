"""What a cubin says of a kernel, read from the text of cuobjdump: resources, access widths, barriers in loops."""

from __future__ import annotations

import collections
import re
from dataclasses import dataclass

WIDEST_ACCESS_BYTES = 16
_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);", re.MULTILINE)
_WIDTHS = {"128": 16, "64": 8, "U16": 2, "S16": 2, "16": 2, "U8": 1, "S8": 1, "8": 1}


@dataclass(frozen=True, slots=True)
class Instruction:
    """One line of SASS. Accesses without a width in their suffixes are of 4 bytes a lane."""

    address: int
    guarded: bool  # by a predicate
    operation: str
    operands: str

    @property
    def access_bytes(self) -> int:
        return next((_WIDTHS[part] for part in self.operation.split(".") if part in _WIDTHS), 4)

    @property
    def target(self) -> int | None:
        """Address that a branch or call goes to."""
        if not self.operation.startswith(("BRA", "CALL")):
            return None
        found = re.search(r"0x([0-9a-f]+)\s*$", self.operands)
        return int(found[1], 16) if found else None

    @property
    def falls_through(self) -> bool:
        operation = self.operation.split(".")[0]
        if operation == "BRA":
            return self.guarded or "," in self.operands  # a predicate may be an operand, too
        return self.guarded or operation not in ("EXIT", "RET")


@dataclass(frozen=True, kw_only=True, slots=True)
class Code:
    """Counts over the instructions of one kernel; each is counted once, however often it runs."""

    instructions: int
    spills: int  # local loads and stores
    atomics: int  # on global memory
    loads: dict[int, int]  # bytes a lane -> global loads, asynchronous copies among them
    stores: dict[int, int]  # bytes a lane -> global stores
    barriers: int
    barriers_in_loop: int


def parse(sass: str) -> list[Instruction]:
    """The instructions in `cuobjdump -sass` output."""
    found = _INSTRUCTION.findall(sass)
    return [Instruction(int(address, 16), bool(guard), op, operands.strip()) for address, guard, op, operands in found]


def read_code(sass: str) -> Code:
    code = parse(sass)
    loads = collections.Counter(i.access_bytes for i in code if i.operation.startswith("LDG"))
    stores = collections.Counter(i.access_bytes for i in code if i.operation.startswith("STG"))
    looping = in_loops(code)
    barriers = [i.address for i in code if i.operation.startswith("BAR.")]
    return Code(
        instructions=len(code),
        spills=sum(i.operation.startswith(("STL", "LDL")) for i in code),
        atomics=sum(i.operation.startswith(("ATOM.", "ATOMG", "RED.")) for i in code),
        loads=dict(sorted(loads.items())),
        stores=dict(sorted(stores.items())),
        barriers=len(barriers),
        barriers_in_loop=sum(address in looping for address in barriers),
    )


def read_resources(usage: str) -> dict[str, int]:
    """REG, STACK, LOCAL of `cuobjdump --dump-resource-usage`."""
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}


def wide_share(accesses: dict[int, int]) -> float:
    """Share of 16-byte accesses in the bytes of one execution of each, to a hundredth; 1 where there is none."""
    total = sum(width * count for width, count in accesses.items())
    return round(WIDEST_ACCESS_BYTES * accesses.get(WIDEST_ACCESS_BYTES, 0) / total, 2) if total else 1.0


def in_loops(code: list[Instruction]) -> set[int]:
    """Addresses of the instructions that can run again: those on a cycle of the control flow.

    A range from a backward branch to its target would also hold code between a loop and a block moved out of line.
    """
    follows: dict[int, list[int]] = {}
    for instruction, after in zip(code, [*code[1:], None], strict=True):
        next_ones = [] if instruction.target is None else [instruction.target]
        if after is not None and instruction.falls_through:
            next_ones.append(after.address)
        follows[instruction.address] = next_ones
    return {address for group in _strongly_connected(follows) if len(group) > 1 for address in group}


def _strongly_connected(follows: dict[int, list[int]]) -> list[list[int]]:
    """Tarjan's components, without recursion: kernels have thousands of instructions."""
    order: dict[int, int] = {}
    lowest: dict[int, int] = {}
    stack: list[int] = []
    open_nodes: set[int] = set()
    components: list[list[int]] = []
    for root in follows:
        if root in order:
            continue
        walk = [(root, iter(follows[root]))]
        while walk:
            node, successors = walk[-1]
            if node not in order:
                order[node] = lowest[node] = len(order)
                stack.append(node)
                open_nodes.add(node)
            for successor in successors:
                if successor not in order:
                    walk.append((successor, iter(follows.get(successor, []))))
                    break
                if successor in open_nodes:
                    lowest[node] = min(lowest[node], order[successor])
            else:
                walk.pop()
                if walk:
                    parent = walk[-1][0]
                    lowest[parent] = min(lowest[parent], lowest[node])
                if lowest[node] == order[node]:
                    at = stack.index(node)
                    components.append(stack[at:])
                    open_nodes.difference_update(stack[at:])
                    del stack[at:]
    return components
