"""Floating-point operations of a traced program, with the bodies of its loops counted as often as they run."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, jaxprs_in_params


@dataclass(frozen=True, slots=True, kw_only=True)
class Counting:
    """What a traced program does not tell."""

    platform: str
    """"cpu", "cuda" or "tpu": whose branch of a `platform_dependent` counts."""
    while_steps: int = 1
    """Turns of a loop of open length."""
    routed_share: float = 1.0
    """Share of its rows that a kernel for grouped products computes: those of a chip's own experts."""


_GROUPED = ("gmm", "tgmm")
"""Functions of JAX's megablox, whose estimates count all rows."""


def program_flops(jaxpr: ClosedJaxpr, counting: Counting) -> float:
    """FLOPs of matrix products and convolutions, over all devices; elementwise work is left out.

    A `scan` counts its body by its length, a `while` by `while_steps`, a `cond` its most expensive branch, a
    `platform_dependent` the branch of its platform, and a `shard_map` its body once for each device of the axes it
    maps. A ragged product counts its rows once and not once for each group. A Pallas kernel counts its own cost
    estimate, or its body for each point of the grid when it has none.
    """
    return _flops(jaxpr.jaxpr, counting)


def _flops(jaxpr: Jaxpr, counting: Counting) -> float:
    return sum(_equation_flops(equation, counting) for equation in jaxpr.eqns)


def _equation_flops(equation: JaxprEqn, counting: Counting) -> float:
    kind, params = equation.primitive.name, equation.params
    if kind in _PRODUCTS:
        return _PRODUCTS[kind](equation)
    if kind == "pallas_call" and params["cost_estimate"] is not None:
        return params["cost_estimate"].flops
    if kind == "cond":
        chosen = _branches(params["branches"], params.get("branches_platforms"), counting.platform)
        return max(_flops(branch.jaxpr, counting) for branch in chosen)
    inner = sum(_flops(jaxpr, counting) for jaxpr in jaxprs_in_params(params))
    share = counting.routed_share if params.get("name") in _GROUPED else 1.0
    return inner and inner * share * _repeats(kind, params, counting.while_steps)


def _branches(branches: Sequence[ClosedJaxpr], platforms: Sequence[Any] | None, platform: str) -> Sequence[ClosedJaxpr]:
    """The branches that may run; of a `platform_dependent` the platform's own, or else the default (None)."""
    if platforms is None:
        return branches
    named = [branch for branch, names in zip(branches, platforms, strict=True) if names and platform in names]
    return named or [branch for branch, names in zip(branches, platforms, strict=True) if names is None]


def _repeats(kind: str, params: dict[str, Any], while_steps: int) -> int:
    if kind == "scan":
        return params["length"]
    if kind == "while":
        return while_steps
    if kind == "shard_map":
        return math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
    if kind == "pallas_call":
        return math.prod(params["grid_mapping"].grid)
    return 1


def _dot_flops(equation: JaxprEqn) -> float:
    (_, contracting), (_, batch) = equation.params["dimension_numbers"]
    return _product_flops(equation, (*contracting, *batch))


def _ragged_dot_flops(equation: JaxprEqn) -> float:
    ragged = equation.params["ragged_dot_dimension_numbers"]
    (_, contracting), (_, batch) = ragged.dot_dimension_numbers
    return _product_flops(equation, (*contracting, *batch, *ragged.rhs_group_dimensions))


def _product_flops(equation: JaxprEqn, shared: Sequence[int]) -> float:
    """A multiplication and an addition for each element on the left and each column on the right that is not shared."""
    left, right = _shape(equation.invars[0]), _shape(equation.invars[1])
    return 2 * math.prod(left) * math.prod(size for axis, size in enumerate(right) if axis not in shared)


def _convolution_flops(equation: JaxprEqn) -> float:
    kernel = _shape(equation.invars[1])
    out_features = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
    return 2 * math.prod(_shape(equation.outvars[0])) * math.prod(kernel) / out_features


def _shape(variable: Any) -> tuple[int, ...]:
    return variable.aval.shape


_PRODUCTS = {
    "dot_general": _dot_flops,
    "ragged_dot_general": _ragged_dot_flops,
    "conv_general_dilated": _convolution_flops,
}
