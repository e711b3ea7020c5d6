"""Finding, in a jaxpr, what a norm's kernels can take along.

An activation behind it:

    y = norm(x)            y = norm(x, activation="silu")
    a = silu(y)      ->    a = y

It is recognized by what it computes, equation by equation, as jax.nn's own function
traces to: `flax.nnx.silu`, `jax.nn.swish` and `y * jax.nn.sigmoid(y)` alike. The pair
becomes one where nothing else uses y.

An array added behind it, with or without an activation behind the sum, as at the end of
a ResNet's block:

    y = norm(x)
    z = y + r              z = norm(x, shortcut=r, activation="relu")
    a = relu(z)      ->    a = z

The sum is then in float32. Where r comes later in the program than the norm, the norm
moves behind it, and so does what uses a BatchNorm's mean and variance; where r depends
on these, or an effect would move, nothing is joined. Nor where r is a smaller array,
broadcast or converted, which XLA does as it adds it. Of two norms whose results are
added, the later one takes the other's.

And the other uses of x, as of a residual stream:

    y = norm(x)            y, h = norm(x), x
    z = x + f(y)     ->    z = h + f(y)

Forward that is the same. Backward what comes to h comes to the kernel, which adds dx to
it as it writes it; a sum apart reads both again.

And the sum before a norm, of what lies in memory anyway, as what a collective of tensor
parallelism made:

    h = x + psum(f)
    y = norm(h)      ->    y, h = norm(x, residual=psum(f))

Other sums stay where they are: XLA takes x + f @ w into the product, where it costs
less than in the norm (compiled for an H100: 5.5 and 6.5 tensors moved).
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

# Before jax 0.12 a jaxpr with its constants was of another class than one without.
ClosedJaxpr: Any = getattr(jax.extend.core, "ClosedJaxpr", Jaxpr)

# What each activation looks like in a user's code.
_WRITTEN: tuple[tuple[str, Callable[[Any], Any]], ...] = (
    ("relu", jax.nn.relu),
    ("silu", jax.nn.silu),
    ("silu", lambda z: z * jax.nn.sigmoid(z)),
    ("silu", lambda z: jax.nn.sigmoid(z) * z),
    ("gelu", functools.partial(jax.nn.gelu, approximate=False)),
    ("gelu_tanh", functools.partial(jax.nn.gelu, approximate=True)),
)

# Their derivative is a function of their own, not that of the jaxpr inside.
_OWN_DERIVATIVE = ("custom_jvp_call", "custom_vjp_call")


# What XLA does to an array where it is read.
_WIDENING = (lax.broadcast_in_dim_p, lax.convert_element_type_p)

# What was made of a jaxpr, as long as it lives: joined, None where nothing was; and of
# a jitted norm's, by the parameters of the norm inside. JAX finds compiled code again
# by the very jaxpr, which its cache returns for each function and shapes seen before.
_joined: MutableMapping[Any, Any] = weakref.WeakKeyDictionary()
_norms: MutableMapping[Any, dict[Any, Any]] = weakref.WeakKeyDictionary()


def join(program: Any) -> Any:
    """The same jaxpr, with what stands around the norms inside them.

    Looks into jitted functions, scans, branches, `jax.checkpoint` and `jax.shard_map`,
    but not into functions with a `custom_jvp` or `custom_vjp`, whose derivatives belong
    to the program as it is.
    """
    return _Joiner()(program)


class _Joiner:
    def __init__(self) -> None:
        self._patterns: dict[Any, list[tuple[str, Jaxpr]]] = {}

    def __call__(self, value: Any) -> Any:
        """A jaxpr, joined, or a tuple with some; anything else as it is."""
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
        """The equation, with the jaxprs in its parameters joined."""
        if eqn.primitive.name in _OWN_DERIVATIVE:
            return eqn
        params = {name: self(value) for name, value in eqn.params.items()}
        same = all(params[name] is value for name, value in eqn.params.items())
        return eqn if same else eqn.replace(params=params)


class _Uses:
    """Where each variable of a jaxpr is read.

    Attributes:
      eqns: the jaxpr's equations.
      count: how often each variable is read, by equations and as a result.
      made: the equation that each variable is a result of.
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
        """Equations that read the first variable among these."""
        for var in variables:
            if isinstance(var, Var):
                yield from dict.fromkeys(self._by.get(var, ()))
                return


# --- norms ----------------------------------------------------------------------------


def _has_no_activation(eqn: JaxprEqn) -> bool:
    """Whether it is `fusednorm_normalize` without an activation."""
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
    """The same norm with an activation, its result named y."""
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
    """The jitted norm with another norm inside.

    Results it adds come second, and operands last: those that are `added`, each by its
    names inside and outside.
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
    """A jitted norm's jaxpr, with another norm and more operands."""
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
    """The equations, with a sum that is normalized inside the norm, which makes it."""
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
    """Where h is added up, and of what: what lies in memory, and what a collective
    made."""
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
    """Whether it comes from outside, from a collective, or from a norm."""
    made = uses.made.get(x)
    return made is None or _is_collective(made) or _norm_inside(made) is not None


def _may_add(inner: JaxprEqn) -> bool:
    """Whether it is a norm of rows that adds nothing yet, and returns no sum."""
    norm, tree = inner.params["norm"], inner.params["tree"]
    x, scale, bias, mask, residual, _ = tree.unflatten(inner.invars)
    has_params = scale is not None or bias is not None
    rowwise = is_rowwise(norm, x.aval.shape, has_params=has_params)
    free = residual is None and mask is None and not inner.params["carries"]
    return rowwise and free and not norm.over


def _with_residual(eqn: JaxprEqn, x: Var, r: Var, h: Var) -> JaxprEqn:
    """The norm of x + r, which makes h too."""
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
    """The equations, with what is added to a norm's result inside the norm.

    From the last norm to the first, that those before it are where they were. Of two
    norms whose results are added it is also the last that need not move.
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
    """Where something is added to y, which nothing else reads, and what."""
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
    """Whether its result is a smaller array, repeated or converted."""
    if eqn is None or eqn.primitive not in _WIDENING:
        return False
    given: Any = eqn.invars[0].aval
    made: Any = eqn.outvars[0].aval
    narrower = given.dtype.itemsize < made.dtype.itemsize
    return narrower or math.prod(given.shape) != math.prod(made.shape)


def _with_shortcut(eqn: JaxprEqn, r: Var, z: Var) -> JaxprEqn:
    """The same norm, to whose result r is added, which makes z."""
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
    """An equation that reads r and the rest, in an order in which r is there by then.

    With it moves what depends on its results. None where r does, or an effect.
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
    """The equations and results, where x of a norm goes on as the norm carries it."""
    now: dict[Var, Var] = {}  # what each x is called by now

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
    """Whether it is a norm that does not carry its x yet."""
    inner = _norm_inside(eqn)
    if inner is None or inner.params["carries"]:
        return False
    return inner.invars[0] is eqn.params["jaxpr"].jaxpr.invars[0]


def _carrying(eqn: JaxprEqn, h: Var) -> JaxprEqn:
    """The same norm, whose second result is x."""
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
    """The jaxpr of each activation of a variable like this."""
    return [(name, jax.make_jaxpr(f)(aval).jaxpr) for name, f in _WRITTEN]


def _match(pattern: Jaxpr, z: Var, uses: _Uses) -> list[int] | None:
    """The equations that compute `pattern` of z, or None.

    All that they compute on the way, and z, must be read by them alone.
    """
    meaning: dict[Var, Var] = {pattern.invars[0]: z}
    matched: list[int] = []
    for wanted in pattern.eqns:
        operands = [
            var if isinstance(var, Literal) else meaning[var] for var in wanted.invars
        ]
        for at in uses.by(operands):
            found = uses.eqns[at]
            if at not in matched and _alike(wanted, operands, found):
                matched.append(at)
                meaning.update(zip(wanted.outvars, found.outvars, strict=True))
                break
        else:
            return None
    (result,) = pattern.outvars
    reads = Counter(
        var for at in matched for var in uses.eqns[at].invars if isinstance(var, Var)
    )
    inner = [var for var in meaning if var is not result]
    if any(reads[meaning[var]] != uses.count[meaning[var]] for var in inner):
        return None
    return matched


def _alike(wanted: JaxprEqn, operands: Sequence[Any], found: JaxprEqn) -> bool:
    """Whether an equation does to these operands what a pattern's does."""
    return (
        found.primitive is wanted.primitive
        and len(found.invars) == len(operands)
        and all(map(_same_operand, operands, found.invars))
        and all(map(_same_type, wanted.outvars, found.outvars))
        and found.params.keys() == wanted.params.keys()
        and all(
            _same_param(wanted.params[name], value)
            for name, value in found.params.items()
        )
    )


def _same_operand(a: Any, b: Any) -> bool:
    if isinstance(a, Literal) and isinstance(b, Literal):
        return _same_type(a, b) and bool(a.val == b.val)
    return a is b


def _same_type(a: Any, b: Any) -> bool:
    # A pattern is traced outside of any shard_map, and varies over no axis of it.
    return all(
        getattr(a.aval, name) == getattr(b.aval, name)
        for name in ("shape", "dtype", "weak_type")
    )


def _same_param(a: Any, b: Any) -> bool:
    if isinstance(a, (Jaxpr, ClosedJaxpr)):
        # What it computes, and who wrote it: a custom derivative is known by that.
        return type(a) is type(b) and (_text(a), _source(a)) == (_text(b), _source(b))
    # The rule of a custom derivative is another object each time that it is traced.
    return bool(a == b) or (hasattr(a, "call_wrapped") and hasattr(b, "call_wrapped"))


def _text(jaxpr: Any) -> str:
    """Printed, without the axes that types vary over, as f32[8]{V:data}."""
    return re.sub(r"\{[A-Z]:[^{}]*\}", "", str(jaxpr))


def _source(jaxpr: Any) -> str:
    return str(getattr(jaxpr, "jaxpr", jaxpr).debug_info.func_src_info)
