"""Measured costs of an iteration's parts, and rough ones for use before anything is measured."""

from __future__ import annotations

import json
from bisect import bisect_right
from dataclasses import asdict, dataclass, fields
from typing import Any

from neoserve.core.config import ModelShape


@dataclass(frozen=True, slots=True)
class Curve:
    """A piecewise-linear function through (x, y) points with growing x: flat before the first, straight on after the
    last."""

    points: tuple[tuple[float, float], ...]

    def at(self, x: float) -> float:
        """The value at x."""
        points = self.points
        if x <= points[0][0] or len(points) == 1:
            return points[0][1]
        right = min(bisect_right(points, (x, float("inf"))), len(points) - 1)
        (x0, y0), (x1, y1) = points[right - 1], points[right]
        return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


@dataclass(frozen=True, slots=True)
class CostTable:
    """Measured costs, in microseconds; all but head, embed and the launch costs are for one layer.

    linear: PRE and POST together, by rows. head: final norm, logits, sampling, by sequences that sample.
    embed: by rows. device_decode_us, device_us_per_token: a decode attention, and each KV token that it reads.
    prefill_us, prefill_us_per_pair: a prefill attention, and each pair of a row and a KV token that it sees.
    host_task_us, host_us_per_token, host_us_per_row: a task of the worker pool, each KV token, each host row.
    handoff_us, handoff_us_per_row: from q, k, v on the device to the pool and back, without the attention.
    prefill_launch_us: CPU time to enqueue a layer of a lap with prompts and decodes; staged_launch_us: more if prompts
        are of HOST sequences. host_launch_us: of a layer of a lap with host rows. decode_launch_us: of one of nothing
        but device decodes, beside another lap; graph_launch_us: of all layers of such a lap that is alone.
    migration_us_per_token: moving one token's KV between the tiers, all layers.
    recorded_rows: growing numbers of rows for which the linear layers of a lap with prompts or host rows are recorded:
        such a lap of fewer rows takes as long as the next of them.
    """

    linear: Curve
    head: Curve
    embed: Curve
    device_decode_us: float
    device_us_per_token: float
    prefill_us: float
    prefill_us_per_pair: float
    host_task_us: float
    host_us_per_token: float
    host_us_per_row: float
    handoff_us: float
    handoff_us_per_row: float
    prefill_launch_us: float
    staged_launch_us: float
    host_launch_us: float
    decode_launch_us: float
    graph_launch_us: float
    migration_us_per_token: float
    recorded_rows: tuple[int, ...] = ()

    @classmethod
    def rough(
        cls,
        shape: ModelShape,
        *,
        value_bytes: int = 2,
        device_gb_s: float = 3500.0,
        device_tflop_s: float = 550.0,
        host_gb_s: float = 100.0,
        link_gb_s: float = 45.0,
        launch_us: float = 12.0,
    ) -> CostTable:
        """Costs from peak rates, for use before anything is measured: by default an H200 with a 16-core Xeon.

        value_bytes: of a weight or a KV value. device_gb_s, host_gb_s: read bandwidth. link_gb_s: between the two.
        launch_us: CPU time to enqueue a stage.
        """
        parameters = shape.layer_parameters
        token_bytes = 2 * shape.num_kv_heads * shape.head_dim * value_bytes
        qkv_bytes = (2 * shape.num_query_heads + 2 * shape.num_kv_heads) * shape.head_dim * value_bytes
        pair_flop = 4 * shape.num_query_heads * shape.head_dim
        return cls(
            linear=_matrix_curve(parameters, value_bytes, device_gb_s, device_tflop_s),
            head=_matrix_curve(shape.vocab_size * shape.hidden_size, value_bytes, device_gb_s, device_tflop_s),
            embed=Curve(((1, 5.0), (1025, 5.0 + 2 * 1024 * shape.hidden_size * value_bytes / (device_gb_s * 1e3)))),
            device_decode_us=5.0,
            device_us_per_token=token_bytes / (device_gb_s * 0.8 * 1e3),
            prefill_us=5.0,
            prefill_us_per_pair=pair_flop / (device_tflop_s * 0.6 * 1e6),
            host_task_us=5.0,
            host_us_per_token=token_bytes / (host_gb_s * 1e3),
            host_us_per_row=0.5,
            handoff_us=28.0,
            handoff_us_per_row=qkv_bytes / (link_gb_s * 1e3),
            prefill_launch_us=3 * launch_us,
            staged_launch_us=2 * launch_us,
            host_launch_us=5 * launch_us,
            decode_launch_us=3 * launch_us,
            graph_launch_us=200.0,
            migration_us_per_token=shape.num_layers * token_bytes / (link_gb_s * 1e3),
        )

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> CostTable:
        """The table that `to_json` wrote; raises `ValueError` when fields are missing or unknown."""
        values: dict[str, Any] = json.loads(text)
        expected = {field.name for field in fields(cls)}
        if values.keys() != expected:
            raise ValueError(f"cost table has fields {sorted(values)}; expected {sorted(expected)}")
        for name in ("linear", "head", "embed"):
            values[name] = Curve(tuple((x, y) for x, y in values[name]["points"]))
        values["recorded_rows"] = tuple(values["recorded_rows"])
        return cls(**values)


def _matrix_curve(parameters: int, value_bytes: int, gb_s: float, tflop_s: float) -> Curve:
    """Time of a matrix product by rows: reading the matrix, plus most of the arithmetic, which hides it but partly."""
    read_us = parameters * value_bytes / (gb_s * 1e3)
    row_us = 2 * parameters / (tflop_s * 1e6)
    rows = (1, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
    return Curve(tuple((n, (read_us**4 + (n * row_us) ** 4) ** 0.25) for n in rows))
