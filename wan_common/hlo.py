"""Reading a scheduled TPU program (``compiled.as_text()``): cycles, kernels and collectives of every computation.

XLA:TPU writes ``estimated_cycles`` beside every fusion it schedules; Pallas kernels and collectives have none. The
instructions of a computation stand in the order they run in, so what lies between the start and the done of an asynchronous
collective is what hides it.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable

BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4,
    "s64": 8, "u64": 8, "f64": 8, "c64": 8,
}  # fmt: skip
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all", "collective-broadcast")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of the schedule.

    Attributes:
        bytes: of its whole result on a device (its operand, for reduce-scatter).
        groups: device indices (into the mesh, flattened) that talk to each other.
    """

    kind: str
    bytes: int
    groups: tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A Pallas kernel call: its name and the shapes (dtype, dims) of its operands and result."""

    name: str
    operands: tuple[tuple[str, tuple[int, ...]], ...]
    result: tuple[str, tuple[int, ...]]


@dataclasses.dataclass
class Event:
    """One step of a computation's schedule.

    kind: "cycles" (value: how many), "kernel" (:class:`Kernel`), "start" and "done" (a key; start's value is the
    :class:`Collective`), "sync" (:class:`Collective`), "loop" (trips, events), "branch" (list of events).
    """

    kind: str
    value: object = None
    key: str = ""
    trips: int = 1
    body: list[list[Event]] = dataclasses.field(default_factory=list)
    op_name: str = ""


def shapes_in(text: str) -> list[tuple[str, tuple[int, ...]]]:
    """Every ``dtype[dims]`` of ``text``."""
    found = re.findall(r"\b(pred|[suf]\d+|bf16|c64)\[([\d,]*)\]", text)
    return [(dtype, tuple(int(d) for d in dims.split(",") if d)) for dtype, dims in found]


def size_of(shapes: Iterable[tuple[str, tuple[int, ...]]]) -> int:
    """Bytes of ``shapes`` without padding."""
    return int(sum(BYTES.get(dtype, 4) * math.prod(dims) for dtype, dims in shapes))


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of HLO."""

    name: str
    shape: str
    opcode: str
    arguments: tuple[str, ...]
    line: str

    def attribute(self, pattern: str) -> str | None:
        """First group of ``pattern`` in the line."""
        found = re.search(pattern, self.line)
        return found.group(1) if found else None


def parse(text: str) -> tuple[str, dict[str, list[Instruction]]]:
    """(name of the entry, instructions by computation).

    Raises:
        ValueError: there is no entry computation.
    """
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", ""
    for line in text.splitlines():
        head = re.match(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{", line)
        if head:
            current = head.group(2)
            computations[current] = []
            entry = current if head.group(1) else entry
            continue
        if line.startswith("}"):
            current = ""
        body = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*)", line) if current else None
        if not body:
            continue
        name, rest = body.groups()
        shape, rest = _split_shape(rest)
        op = re.match(r"([\w\-]+)\(", rest)
        if op:
            arguments = _arguments(rest[op.end() :])
            computations[current].append(Instruction(name, shape, op.group(1), arguments, line))
    if not entry:
        raise ValueError("no ENTRY computation: not the text of a compiled program")
    return entry, computations


def _split_shape(rest: str) -> tuple[str, str]:
    """The shape (a tuple's parentheses may nest) and what follows it."""
    if not rest.startswith("("):
        shape, _, after = rest.partition(" ")
        return shape, after
    depth = 0
    for at, char in enumerate(rest):
        depth += (char == "(") - (char == ")")
        if depth == 0:
            return rest[: at + 1], rest[at + 2 :]
    return rest, ""


def _arguments(text: str) -> tuple[str, ...]:
    """Names of the operands up to the closing parenthesis."""
    depth = 1
    for at, char in enumerate(text):
        depth += (char == "(") - (char == ")")
        if depth == 0:
            return tuple(re.findall(r"%([\w.\-]+)", text[:at]))
    return ()


def replica_groups(line: str) -> tuple[tuple[int, ...], ...]:
    """Groups of a collective, in either notation, or the pairs of a permute."""
    pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", line)
    if pairs:
        return tuple(tuple(int(n) for n in pair.split(",")) for pair in re.findall(r"\{?(\d+,\d+)", pairs.group(1)))
    listed = re.search(r"replica_groups=\{(\{.*?\})\}", line)
    if listed:
        return tuple(tuple(int(n) for n in group.split(",")) for group in re.findall(r"\{([\d,]+)\}", listed.group(1)))
    named = re.search(r"replica_groups=(?:@\w+|mesh)\[([^\]]*)\] ?(?:, device_ids=\(([\d,]+)\))? ?\{([^}]*)\}", line)
    if named:
        return _named_groups(*named.groups())
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line)
    if not iota:
        return ()
    import numpy as np

    dims = [int(n) for n in iota.group(3).split(",")]
    order = np.arange(math.prod(dims)).reshape(dims)
    if iota.group(4):
        order = order.transpose([int(n) for n in iota.group(4).split(",")])
    return tuple(tuple(int(n) for n in row) for row in order.reshape(int(iota.group(1)), int(iota.group(2))))


def _named_groups(axes: str, ids: str | None, chosen: str) -> tuple[tuple[int, ...], ...]:
    """Groups along the ``chosen`` axes of a mesh written as ``'axis_0'=2,'axis_1'=4``."""
    import numpy as np

    names = re.findall(r"'([^']+)'=(\d+)", axes)
    sizes = [int(size) for _, size in names]
    picked = re.findall(r"'([^']+)'", chosen)
    order = np.array([int(n) for n in ids.split(",")] if ids else range(math.prod(sizes))).reshape(sizes)
    along = [n for n, (name, _) in enumerate(names) if name in picked]
    across = [n for n in range(len(names)) if n not in along]
    rows = order.transpose(across + along).reshape(-1, math.prod(sizes[n] for n in along))
    return tuple(tuple(int(n) for n in row) for row in rows)


def schedule(text: str) -> list[Event]:
    """The entry computation as events, in the order they run in; loops and branches hold their own.

    Raises:
        ValueError: a loop whose trip count is not known, or no entry.
    """
    entry, computations = parse(text)
    return _events(entry, computations)


def _events(name: str, computations: dict[str, list[Instruction]]) -> list[Event]:
    events: list[Event] = []
    instructions = computations[name]
    shapes = {instruction.name: instruction.shape for instruction in instructions}
    for one in instructions:
        events += _instruction_events(one, shapes, computations)
    return events


def _instruction_events(one: Instruction, shapes: dict[str, str], computations: dict[str, list[Instruction]]) -> list[Event]:
    op_name = one.attribute(r'op_name="([^"]*)"') or ""
    base = re.sub(r"-(start|done|update)$", "", one.opcode)
    if one.opcode == "while":
        body = one.attribute(r"body=%?([\w.\-]+)")
        trips = one.attribute(r'"known_trip_count":\{"n":"(\d+)"') or _trips(one, computations)
        if trips is None or body is None:
            raise ValueError(f"{one.name}: a loop without a known trip count")
        return [Event("loop", trips=int(trips), body=[_events(body, computations)], op_name=op_name)]
    if one.opcode == "conditional":
        two = ",".join(re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", one.line))
        branches = one.attribute(r"branch_computations=\{([^}]*)\}") or two
        return [Event("branch", body=[_events(b, computations) for b in re.findall(r"[\w.\-]+", branches)], op_name=op_name)]
    if one.opcode == "call":
        called = one.attribute(r"to_apply=%?([\w.\-]+)")
        return _events(called, computations) if called else []
    if base in KINDS or one.opcode.startswith("async-"):
        return _collective_events(one, base, computations)
    called = one.attribute(r"calls=%?([\w.\-]+)")
    events = []
    cycles = one.attribute(r'"estimated_cycles":"(\d+)"')
    if cycles:
        events.append(Event("cycles", int(cycles), key=one.name, op_name=op_name))
    if called and one.opcode == "fusion":
        events += _inside(called, computations)
    if one.opcode == "custom-call" and 'custom_call_target="tpu_custom_call"' in one.line:
        operands = tuple(found[0] for a in one.arguments if (found := shapes_in(shapes.get(a, ""))))
        name = one.attribute(r'kernel_name="([^"]+)"') or re.sub(r"[.\d]+$", "", one.name)
        events.append(Event("kernel", Kernel(name, operands, (shapes_in(one.shape) or [("", ())])[0]), key=one.name, op_name=op_name))
    return events


def _inside(called: str, computations: dict[str, list[Instruction]]) -> list[Event]:
    """What a fusion that carries a collective (XLA:TPU's async collective fusion) does to it.

    One fusion starts it, any number of others compute while it goes on, one waits for it; the collective is written in all
    of them, with one channel.
    """
    instructions = computations.get(called, [])
    for one in instructions:
        base = re.sub(r"-(start|done)$", "", one.opcode)
        if base not in KINDS:
            continue
        text = "".join(other.line for other in instructions)
        key = "channel " + (one.attribute(r"channel_id=(\d+)") or called)
        if "AsyncCollectiveStart" in text:
            return [Event("start", _collective(one, base), key=key)]
        if "AsyncCollectiveDone" in text:
            return [Event("done", key=key)]
        if "async_collective_fusion" in called:
            return []
        return [Event("sync", _collective(one, base), key=called)]
    return []


def _collective_events(one: Instruction, base: str, computations: dict[str, list[Instruction]]) -> list[Event]:
    op_name = one.attribute(r'op_name="([^"]*)"') or ""
    if one.opcode == "async-start":
        called = one.attribute(r"calls=%?([\w.\-]+)") or ""
        for inner in computations.get(called, []):
            if inner.opcode in KINDS:
                return [Event("start", _collective(inner, inner.opcode), key=one.name, op_name=op_name)]
        return []
    if one.opcode.endswith("-start"):
        return [Event("start", _collective(one, base), key=one.name, op_name=op_name)]
    if one.opcode.endswith("-done"):
        return [Event("done", key=one.arguments[0] if one.arguments else "")]
    if one.opcode.endswith("-update"):
        return []
    return [Event("sync", _collective(one, base), key=one.name, op_name=op_name)]


def _collective(one: Instruction, kind: str) -> Collective:
    found = shapes_in(one.shape)
    if one.opcode.endswith("-start"):
        # (operands, results, ...contexts): of all-gather and permute the results; of all-reduce the shape itself
        data = [s for s in found if len(s[1]) > 0]
        if kind in ("all-gather", "collective-permute", "all-to-all") and len(data) > 1:
            half = len(data) // 2
            data = data[half : 2 * half]
        found = data
    groups = replica_groups(one.line)
    size = size_of(found)
    if kind == "reduce-scatter":
        size *= max((len(g) for g in groups), default=1)
    return Collective(kind, size, groups)


def _trips(one: Instruction, computations: dict[str, list[Instruction]]) -> str | None:
    """The trip count of a loop that counts from 0 to a constant, from its condition."""
    condition = one.attribute(r"condition=%?([\w.\-]+)")
    lines = computations.get(condition or "", [])
    constants = [found for i in lines if i.opcode == "constant" and (found := i.attribute(r"constant\((\d+)\)"))]
    return constants[0] if len(constants) == 1 else None


@dataclasses.dataclass
class Totals:
    """What a program does, all loops counted.

    Attributes:
        fusion_cycles: sum of estimated cycles. kernel_seconds: by kernel name. collectives: kind -> [count, bytes].
        collective_seconds: if nothing hid them. exposed_seconds: what the schedule does not hide.
        seconds: fusions, kernels and exposed collectives.
    """

    fusion_cycles: int = 0
    kernel_seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    collectives: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    collective_seconds: float = 0.0
    exposed_seconds: float = 0.0
    seconds: float = 0.0

    def add(self, other: Totals, times: int) -> None:
        """Add ``other``, run ``times`` times."""
        self.fusion_cycles += other.fusion_cycles * times
        for name, seconds in other.kernel_seconds.items():
            self.kernel_seconds[name] = self.kernel_seconds.get(name, 0.0) + seconds * times
        for kind, (count, size) in other.collectives.items():
            mine = self.collectives.setdefault(kind, [0, 0])
            mine[0] += count * times
            mine[1] += size * times
        self.collective_seconds += other.collective_seconds * times
        self.exposed_seconds += other.exposed_seconds * times
        self.seconds += other.seconds * times


def total(
    events: list[Event], clock_hz: float, kernel_seconds: Callable[[Kernel], float], collective_seconds: Callable[[Collective], float]
) -> Totals:
    """Play the schedule: one core computes, the links carry one collective after another, a done waits for its collective."""
    out = Totals()
    now = links_free = 0.0
    pending: dict[str, float] = {}

    def launch(what: Collective) -> float:
        nonlocal links_free
        seconds = collective_seconds(what)
        entry = out.collectives.setdefault(what.kind, [0, 0])
        entry[0] += 1
        entry[1] += what.bytes
        out.collective_seconds += seconds
        links_free = max(now, links_free) + seconds
        return links_free

    def wait(until: float) -> None:
        nonlocal now
        out.exposed_seconds += max(0.0, until - now)
        now = max(now, until)

    for event in events:
        if event.kind == "cycles":
            assert isinstance(event.value, int)
            out.fusion_cycles += event.value
            now += event.value / clock_hz
        elif event.kind == "kernel":
            assert isinstance(event.value, Kernel)
            seconds = kernel_seconds(event.value)
            out.kernel_seconds[event.value.name] = out.kernel_seconds.get(event.value.name, 0.0) + seconds
            now += seconds
        elif event.kind in ("start", "sync"):
            assert isinstance(event.value, Collective)
            end = launch(event.value)
            if event.kind == "start":
                pending[event.key] = end
            elif event.kind == "sync":
                wait(end)
        elif event.kind == "done":
            wait(pending.pop(event.key, now))
        else:
            parts = [total(body, clock_hz, kernel_seconds, collective_seconds) for body in event.body]
            part = max(parts, key=lambda p: p.seconds, default=Totals())  # of branches the longest
            out.add(part, event.trips)
            out.seconds -= part.seconds * event.trips  # `now` counts it
            now += part.seconds * event.trips
    if pending:
        wait(max(pending.values()))
    out.seconds += now
    return out


def expensive(events: list[Event], count: int = 20, trips: int = 1) -> list[tuple[int, str, str]]:
    """The ``count`` most expensive fusions: (cycles over all trips, name, op name)."""
    found: list[tuple[int, str, str]] = []
    for event in events:
        if event.kind == "cycles":
            assert isinstance(event.value, int)
            found.append((event.value * trips, event.key, event.op_name))
        for body in event.body:
            found += expensive(body, count, trips * event.trips)
    return sorted(found, reverse=True)[:count]
