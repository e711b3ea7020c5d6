"""Joins a norm in a jaxpr with the operations around it that its kernels can do.

There are four patterns. An activation after the norm:

    y = norm(x)            y = norm(x, activation="silu")
    a = silu(y)      ->    a = y

An activation is recognized by what it computes: its equations are compared with those
that jax.nn's own function traces to. `flax.nnx.silu`, `jax.nn.swish` and
`y * jax.nn.sigmoid(y)` all match. The pair is joined only if nothing else uses y.

An array added after the norm, with or without an activation of the sum, as at the end
of a ResNet's block:

    y = norm(x)
    z = y + r              z = norm(x, shortcut=r, activation="relu")
    a = relu(z)      ->    a = z

The sum is then in float32. If r is computed later in the program than the norm, the
norm moves behind r, and so does whatever uses a BatchNorm's mean and variance. Nothing
is joined if r depends on these, or if an effect would have to move. Nothing is joined
either if r is a smaller array that is broadcast or converted, because XLA does that as
it adds r. If the results of two norms are added, the later norm takes the other's
result.

Other uses of x beside the norm, as in a residual stream:

    y = norm(x)            y, h = norm(x), x
    z = x + f(y)     ->    z = h + f(y)

The forward stays the same. In the backward, the cotangent of h goes to the kernel,
which adds dx to it as it writes dx. A separate sum would read both again.

A sum before the norm, if one of its arrays lies in memory anyway and a collective made
the other, for example in tensor parallelism:

    h = x + psum(f)
    y = norm(h)      ->    y, h = norm(x, residual=psum(f))

Other sums stay where they are: XLA fuses x + f @ w into the product, where the sum
costs less than in the norm (compiled for an H100: 5.5 and 6.5 tensors moved).
"""

import dataclasses
import functools
import math
import re
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from typing import Any

import jax
import jax.extend.core
from jax import lax
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var

from fusednorm.kernels.geometry import is_rowwise
from fusednorm.kernels.norm import norm_p

# Before jax 0.12 a jaxpr with constants has another class than one without.
ClosedJaxpr: Any = getattr(jax.extend.core, "ClosedJaxpr", Jaxpr)

# How each activation may be written in a user's code.
_WRITTEN: tuple[tuple[str, Callable[[Any], Any]], ...] = (
    ("relu", jax.nn.relu),
    ("silu", jax.nn.silu),
    ("silu", lambda z: z * jax.nn.sigmoid(z)),
    ("silu", lambda z: jax.nn.sigmoid(z) * z),
    ("gelu", functools.partial(jax.nn.gelu, approximate=False)),
    ("gelu_tanh", functools.partial(jax.nn.gelu, approximate=True)),
)

# These calls bring their own derivative, which is not that of the jaxpr inside them.
_OWN_DERIVATIVE = ("custom_jvp_call", "custom_vjp_call")

# Primitives that XLA applies to an array as it reads it.
_WIDENING = (lax.broadcast_in_dim_p, lax.convert_element_type_p)

# Results per jaxpr, kept as long as the jaxpr lives. `_joined` holds the joined jaxpr,
# or None if nothing was joined. `_norms` holds the jaxprs made from a jitted norm's, by
# the parameters of the norm inside. JAX's cache returns the same jaxpr for a function
# and shapes seen before, and finds compiled code by jaxpr identity. So one jaxpr must
# always give the same result object here.
_joined: MutableMapping[Any, Any] = weakref.WeakKeyDictionary()
_norms: MutableMapping[Any, dict[Any, Any]] = weakref.WeakKeyDictionary()


def join(program: Any) -> Any:
    """Returns the jaxpr with the operations around its norms joined into them.

    It looks into jitted functions, scans, branches, `jax.checkpoint` and
    `jax.shard_map`. It skips functions with a `custom_jvp` or `custom_vjp`, because
    their derivatives belong to the program as it is.
    """
    return _Joiner()(program)


class _Joiner:
    def __init__(self) -> None:
        self._patterns: dict[Any, list[tuple[str, Jaxpr]]] = {}

    def __call__(self, value: Any) -> Any:
        """Joins a jaxpr, or those in a tuple. Returns any other value unchanged."""
        if isinstance(value, tuple):
            joined = tuple(self(item) for item in value)
            changed = any(a is not b for a, b in zip(joined, value, strict=True))
            return joined if changed else value
        if not isinstance(value, (Jaxpr, ClosedJaxpr)):
            return value
        if value not in _joined:
            if isinstance(value, Jaxpr):
                now = self._open(value)
            else:
                inner = self(value.jaxpr)
                same = inner is value.jaxpr
                now = value if same else value.replace(jaxpr=inner)
            _joined[value] = None if now is value else now
        now = _joined[value]
        return value if now is None else now

    def _open(self, jaxpr: Jaxpr) -> Jaxpr:
        eqns = [self._inside(eqn) for eqn in jaxpr.eqns]
        eqns = _with_residuals(jaxpr, eqns)
        eqns = _with_shortcuts(jaxpr, eqns)
        uses = _Uses(jaxpr, eqns)
        gone: set[int] = set()
        for at, eqn in enumerate(eqns):
            if at in gone or not _has_no_activation(eqn):
                continue
            y = eqn.outvars[0]
            if y.aval not in self._patterns:
                self._patterns[y.aval] = _patterns_of(y.aval)
            for activation, pattern in self._patterns[y.aval]:
                matched = _match(pattern, y, uses)
                if matched is not None:
                    last = eqns[matched[-1]]
                    eqns[at] = _with_activation(eqn, activation, last.outvars[0])
                    gone.update(matched)
                    break
        kept = [eqn for at, eqn in enumerate(eqns) if at not in gone]
        kept, outvars = _carried(kept, jaxpr.outvars)
        same = len(kept) == len(jaxpr.eqns) and all(
            a is b for a, b in zip(kept, jaxpr.eqns, strict=True)
        )
        return jaxpr if same else jaxpr.replace(eqns=kept, outvars=outvars)

    def _inside(self, eqn: JaxprEqn) -> JaxprEqn:
        """Returns the equation with the jaxprs in its parameters joined."""
        if eqn.primitive.name in _OWN_DERIVATIVE:
            return eqn
        params = {name: self(value) for name, value in eqn.params.items()}
        same = all(params[name] is value for name, value in eqn.params.items())
        return eqn if same else eqn.replace(params=params)


class _Uses:
    """The places where each variable of a jaxpr is read.

    Attributes:
      eqns: the jaxpr's equations.
      count: number of reads of each variable, by equations and as a result.
      made: equation that each variable is a result of.
    """

    def __init__(self, jaxpr: Jaxpr, eqns: Sequence[JaxprEqn]):
        self.eqns = list(eqns)
        self.count: Counter[Var] = Counter()
        self.made = {var: eqn for eqn in eqns for var in eqn.outvars}
        self._by: dict[Var, list[int]] = {}
        for at, eqn in enumerate(eqns):
            for var in eqn.invars:
                if isinstance(var, Var):
                    self.count[var] += 1
                    self._by.setdefault(var, []).append(at)
        self.count.update(var for var in jaxpr.outvars if isinstance(var, Var))

    def by(self, variables: Sequence[Any]) -> Iterator[int]:
        """Yields the indices of equations that read the first variable in the list."""
        for var in variables:
            if isinstance(var, Var):
                yield from dict.fromkeys(self._by.get(var, ()))
                return


# --- norms ----------------------------------------------------------------------------


def _has_no_activation(eqn: JaxprEqn) -> bool:
    """Tells whether an equation is `fusednorm_normalize` without an activation."""
    inner = _norm_inside(eqn)
    return inner is not None and inner.params["norm"].activation is None


def _norm_inside(eqn: JaxprEqn) -> JaxprEqn | None:
    if eqn.params.get("name") != "fusednorm_normalize":
        return None
    body = eqn.params["jaxpr"].jaxpr
    if [e.primitive for e in body.eqns] != [norm_p]:
        return None
    (inner,) = body.eqns
    return inner if list(body.outvars) == list(inner.outvars) else None


def _with_activation(eqn: JaxprEqn, activation: str, y: Var) -> JaxprEqn:
    """Returns the norm with an activation, and with y as its result."""
    inner = _norm_inside(eqn)
    assert inner is not None
    norm = dataclasses.replace(inner.params["norm"], activation=activation)
    inner = inner.replace(params=inner.params | {"norm": norm})
    return _with_inside(eqn, inner, [y, *eqn.outvars[1:]])


def _with_inside(
    eqn: JaxprEqn,
    inner: JaxprEqn,
    outvars: list[Var],
    added: Sequence[tuple[Var, Var]] = (),
) -> JaxprEqn:
    """Returns the jitted norm with another norm inside.

    Args:
      eqn: the call of the jitted norm.
      inner: the norm to put inside.
      outvars: the results. A result that `eqn` does not have comes second.
      added: operands that `eqn` does not have, as (name inside, name outside). They
        come last.
    """
    closed = eqn.params["jaxpr"]
    of_norms, key = _norms.setdefault(closed, {}), frozenset(inner.params.items())
    if key not in of_norms:
        of_norms[key] = _body(closed, inner, [inside for inside, _ in added])
    params = eqn.params | {"jaxpr": of_norms[key]}
    for name in ("out_shardings", "out_layouts"):
        first, *others = params[name]
        copies = [first] * (len(outvars) - len(eqn.outvars))
        params[name] = (first, *copies, *others)
    for name in ("in_shardings", "in_layouts", "donated_invars"):
        params[name] = (*params[name], *params[name][:1] * len(added))
    operands = [*eqn.invars, *(outside for _, outside in added)]
    return eqn.replace(params=params, invars=operands, outvars=outvars)


def _body(closed: Any, inner: JaxprEqn, more: Sequence[Var]) -> Any:
    """Returns a jitted norm's jaxpr with another norm inside and more operands."""
    body = closed.jaxpr
    if more:
        unnamed = body.debug_info._replace(arg_names=None)
        body = body.replace(invars=[*body.invars, *more], debug_info=unnamed)
    if len(inner.outvars) > len(body.outvars):
        unnamed = body.debug_info._replace(result_paths=None)
        body = body.replace(outvars=list(inner.outvars), debug_info=unnamed)
    body = body.replace(eqns=[inner])
    return body if isinstance(closed, Jaxpr) else closed.replace(jaxpr=body)


def _with_residuals(jaxpr: Jaxpr, eqns: Sequence[JaxprEqn]) -> list[JaxprEqn]:
    """Returns the equations with the sum before a norm moved into the norm."""
    uses = _Uses(jaxpr, eqns)
    now = list(eqns)
    taken: set[int] = set()
    for at, eqn in enumerate(eqns):
        inner = _norm_inside(eqn)
        if inner is None or not _may_add(inner):
            continue
        h: Any = eqn.invars[0]
        found = _sum_before(h, uses)
        if found is None or next(uses.by([h])) != at:  # the norm makes h for others
            continue
        add, x, r = found
        now[at] = _with_residual(eqn, x, r, h)
        taken.add(add)
    return [eqn for at, eqn in enumerate(now) if at not in taken]


def _sum_before(h: Any, uses: _Uses) -> tuple[int, Var, Var] | None:
    """Finds the sum that makes h from an array in memory and a collective's result.

    Returns:
      Index of the addition, the array x in memory, and the collective's result r; or
      None.
    """
    add = uses.made.get(h) if isinstance(h, Var) else None
    if add is None or add.primitive is not lax.add_p:
        return None
    added = [var for var in add.invars if isinstance(var, Var)]
    if len(added) != 2:
        return None
    x, r = sorted(added, key=lambda var: _is_collective(uses.made.get(var)))
    alike = x.aval == r.aval == h.aval
    there = uses.count[x] > 1 or _is_in_memory(x, uses)
    if not (alike and there and _is_collective(uses.made.get(r))):
        return None
    return next(at for at in uses.by([r]) if uses.eqns[at] is add), x, r


_COLLECTIVES = (
    "all_gather",
    "all_to_all",
    "ppermute",
    "psum",
    "psum_invariant",
    "reduce_scatter",
)


def _is_collective(eqn: JaxprEqn | None) -> bool:
    return eqn is not None and eqn.primitive.name in _COLLECTIVES


def _is_in_memory(x: Var, uses: _Uses) -> bool:
    """Tells whether x is an input, or was made by a collective or by a norm."""
    made = uses.made.get(x)
    return made is None or _is_collective(made) or _norm_inside(made) is not None


def _may_add(inner: JaxprEqn) -> bool:
    """Tells whether a norm is rowwise, adds nothing yet and does not return h."""
    norm, tree = inner.params["norm"], inner.params["tree"]
    x, scale, bias, mask, residual, _ = tree.unflatten(inner.invars)
    has_params = scale is not None or bias is not None
    rowwise = is_rowwise(norm, x.aval.shape, has_params=has_params)
    free = residual is None and mask is None and not inner.params["carries"]
    return rowwise and free and not norm.axis_names


def _with_residual(eqn: JaxprEqn, x: Var, r: Var, h: Var) -> JaxprEqn:
    """Returns the norm of x + r, which also returns h."""
    inner = _norm_inside(eqn)
    assert inner is not None
    *given, _, shortcut = inner.params["tree"].unflatten(inner.invars)
    residual = Var(r.aval)
    operands = (*given, residual, shortcut)
    y, *others = inner.outvars
    inner = inner.replace(
        params=inner.params | {"tree": jax.tree.structure(operands), "carries": True},
        invars=jax.tree.leaves(operands),
        outvars=[y, Var(h.aval), *others],
    )
    y, *others = eqn.outvars
    joined = _with_inside(eqn, inner, [y, h, *others], [(residual, r)])
    return joined.replace(invars=[x, *joined.invars[1:]])


def _with_shortcuts(jaxpr: Jaxpr, eqns: Sequence[JaxprEqn]) -> list[JaxprEqn]:
    """Returns the equations with the sum after a norm moved into the norm.

    Norms are handled from last to first, so that the equations before one stay at their
    indices. If the results of two norms are added, the later norm takes the sum: it is
    the one that need not move.
    """
    uses = _Uses(jaxpr, eqns)
    now = list(eqns)
    taken: set[int] = set()
    for at in reversed(range(len(eqns))):
        if not _has_no_activation(eqns[at]) or _has_shortcut(eqns[at]):
            continue
        found = _sum_behind(eqns[at].outvars[0], uses)
        if found is None or found[0] in taken:
            continue
        add, r = found
        joined = _with_shortcut(eqns[at], r, eqns[add].outvars[0])
        rest = [eqn for eqn in now[at + 1 :] if eqn is not eqns[add]]
        moved = _behind(joined, rest, r)
        if moved is not None:
            now = [*now[:at], *moved]
            taken.add(add)
    return now


def _has_shortcut(eqn: JaxprEqn) -> bool:
    inner = _norm_inside(eqn)
    assert inner is not None
    return inner.params["tree"].unflatten(inner.invars)[-1] is not None


def _sum_behind(y: Var, uses: _Uses) -> tuple[int, Var] | None:
    """Finds where an array r is added to y, if nothing else reads y.

    Returns:
      Index of the addition, and r; or None.
    """
    at = next(uses.by([y]), None)
    if at is None or uses.count[y] != 1:
        return None
    add = uses.eqns[at]
    others = [var for var in add.invars if isinstance(var, Var) and var is not y]
    if add.primitive is not lax.add_p or len(others) != 1:
        return None
    (r,), (z,) = others, add.outvars
    alike = r.aval == y.aval == z.aval
    return (at, r) if alike and not _is_widened(uses.made.get(r)) else None


def _is_widened(eqn: JaxprEqn | None) -> bool:
    """Tells whether the result is a smaller array, broadcast or converted to wider."""
    if eqn is None or eqn.primitive not in _WIDENING:
        return False
    given: Any = eqn.invars[0].aval
    made: Any = eqn.outvars[0].aval
    narrower = given.dtype.itemsize < made.dtype.itemsize
    return narrower or math.prod(given.shape) != math.prod(made.shape)


def _with_shortcut(eqn: JaxprEqn, r: Var, z: Var) -> JaxprEqn:
    """Returns the norm that adds r to its result, which is then z."""
    inner = _norm_inside(eqn)
    assert inner is not None
    shortcut = Var(r.aval)
    *operands, _ = inner.params["tree"].unflatten(inner.invars)
    inner = inner.replace(
        params=inner.params | {"tree": jax.tree.structure((*operands, shortcut))},
        invars=[*inner.invars, shortcut],
    )
    return _with_inside(eqn, inner, [z, *eqn.outvars[1:]], [(shortcut, r)])


def _behind(eqn: JaxprEqn, rest: Sequence[JaxprEqn], r: Var) -> list[JaxprEqn] | None:
    """Orders `eqn`, which reads r, and `rest` so that r is computed before `eqn`.

    Equations that depend on `eqn`'s results move with it. Returns None if r depends on
    them, or if an equation with an effect would have to move.
    """
    last = next((at for at, other in enumerate(rest) if r in other.outvars), -1)
    before, behind, late = [], [eqn], set(eqn.outvars)
    for other in rest[: last + 1]:
        if late.isdisjoint(v for v in other.invars if isinstance(v, Var)):
            before.append(other)
        elif other.effects:
            return None
        else:
            behind.append(other)
            late.update(other.outvars)
    return None if r in late else [*before, *behind, *rest[last + 1 :]]


def _carried(
    eqns: Sequence[JaxprEqn], outvars: Sequence[Any]
) -> tuple[list[JaxprEqn], list[Any]]:
    """Routes later uses of a norm's x through the norm.

    The norm then returns x as its second result, h, and the later uses read h.
    """
    now: dict[Var, Var] = {}  # the current variable of each x

    def renamed(variables: Sequence[Any]) -> list[Any]:
        return [now.get(v, v) if isinstance(v, Var) else v for v in variables]

    left = Counter(v for eqn in eqns for v in eqn.invars if isinstance(v, Var))
    left.update(v for v in outvars if isinstance(v, Var))
    result = []
    for eqn in eqns:
        given = [v for v in eqn.invars if isinstance(v, Var)]
        left.subtract(given)
        if any(v in now for v in given):
            eqn = eqn.replace(invars=renamed(eqn.invars))
        if given and left[given[0]] and _may_carry(eqn):
            h = Var(eqn.invars[0].aval)
            eqn = _carrying(eqn, h)
            now[given[0]] = h
        result.append(eqn)
    return result, renamed(outvars)


def _may_carry(eqn: JaxprEqn) -> bool:
    """Tells whether an equation is a norm that does not return x or h yet."""
    inner = _norm_inside(eqn)
    if inner is None or inner.params["carries"]:
        return False
    return inner.invars[0] is eqn.params["jaxpr"].jaxpr.invars[0]


def _carrying(eqn: JaxprEqn, h: Var) -> JaxprEqn:
    """Returns the norm with x as its second result, named h."""
    inner = _norm_inside(eqn)
    assert inner is not None
    y, *others = inner.outvars
    inner = inner.replace(
        params=inner.params | {"carries": True},
        outvars=[y, Var(inner.invars[0].aval), *others],
    )
    y, *others = eqn.outvars
    return _with_inside(eqn, inner, [y, h, *others])


# --- patterns -------------------------------------------------------------------------


def _patterns_of(aval: Any) -> list[tuple[str, Jaxpr]]:
    """Traces each activation, for a variable of this type, to a jaxpr."""
    # On the mesh of the type: in a shard_map, `jax.set_mesh` may say another.
    with jax.sharding.use_abstract_mesh(aval.sharding.mesh):
        return [(name, jax.make_jaxpr(f)(aval).jaxpr) for name, f in _WRITTEN]


def _match(pattern: Jaxpr, z: Var, uses: _Uses) -> list[int] | None:
    """Finds the equations that compute `pattern` of z. Returns None if there are none.

    Only these equations may read z and their intermediate results.
    """
    counterpart: dict[Var, Var] = {pattern.invars[0]: z}
    matched: list[int] = []
    for wanted in pattern.eqns:
        operands = [
            var if isinstance(var, Literal) else counterpart[var]
            for var in wanted.invars
        ]
        for at in uses.by(operands):
            found = uses.eqns[at]
            if at not in matched and _alike(wanted, operands, found):
                matched.append(at)
                counterpart.update(zip(wanted.outvars, found.outvars, strict=True))
                break
        else:
            return None
    (result,) = pattern.outvars
    reads = Counter(
        var for at in matched for var in uses.eqns[at].invars if isinstance(var, Var)
    )
    inner = [var for var in counterpart if var is not result]
    if any(reads[counterpart[var]] != uses.count[counterpart[var]] for var in inner):
        return None
    return matched


def _alike(wanted: JaxprEqn, operands: Sequence[Any], found: JaxprEqn) -> bool:
    """Tells whether an equation does to `operands` what a pattern's equation does."""
    return (
        found.primitive is wanted.primitive
        and len(found.invars) == len(operands)
        and all(map(_same_operand, operands, found.invars))
        and all(map(_same_type, wanted.outvars, found.outvars))
        and found.params.keys() == wanted.params.keys()
        and all(
            name == "ctx_mesh" or _same_param(wanted.params[name], value)
            for name, value in found.params.items()
        )
    )


def _same_operand(a: Any, b: Any) -> bool:
    if isinstance(a, Literal) and isinstance(b, Literal):
        return _same_type(a, b) and bool(a.val == b.val)
    return a is b


def _same_type(a: Any, b: Any) -> bool:
    # A pattern is traced outside any shard_map, so its values vary over no mesh axis.
    return all(
        getattr(a.aval, name) == getattr(b.aval, name)
        for name in ("shape", "dtype", "weak_type")
    )


def _same_param(a: Any, b: Any) -> bool:
    if isinstance(a, (Jaxpr, ClosedJaxpr)):
        # Compare what it computes and its source, which identifies a custom derivative.
        return type(a) is type(b) and (_text(a), _source(a)) == (_text(b), _source(b))
    # Each trace makes a new object for the rule of a custom derivative.
    return bool(a == b) or (hasattr(a, "call_wrapped") and hasattr(b, "call_wrapped"))


def _text(jaxpr: Any) -> str:
    """Prints a jaxpr without the axes that types vary over, as in f32[8]{V:data}."""
    return re.sub(r"\{[A-Z]:[^{}]*\}", "", str(jaxpr))


def _source(jaxpr: Any) -> str:
    return str(getattr(jaxpr, "jaxpr", jaxpr).debug_info.func_src_info)
