"""Which call is compressed, and with what.

A policy is a function of facts that both ends of a message share: key, operation, dtype, number of elements, step, and
the ranks of its two ends. It must not look at data or at its own rank. :class:`Rules` covers most needs; any callable
of the same signature will do.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch

from compactdist import codecs
from compactdist.codecs import Codec
from compactdist.errors import ConfigError

__all__ = [
    "PASS",
    "Answer",
    "CallInfo",
    "Mode",
    "Policy",
    "Rule",
    "Rules",
    "check_mode",
    "describe_policy",
    "rules_from_json",
]

PASS = "pass"
"""A rule or a policy function returns this to let a call pass through."""

Mode = Literal["wait", "predict-now"]
"""When an all-gather's outputs are written: once its frames have arrived, or at once, with what was predicted."""

_PREDICTS = "predict-now"


@dataclass(frozen=True, slots=True)
class CallInfo:
    """What a policy may look at.

    Attributes:
        key: call site, e.g. ``"cond/blocks.3.attn/all_gather#0"``.
        op: ``"all_gather"``, ``"all_to_all"``, ``"send"``, ``"broadcast"``, ``"reduce_scatter"`` or ``"all_reduce"``.
            The last two are compressed only where the policy names a codec.
        dtype: the tensor's dtype.
        numel: elements of one directed message: the input of an all-gather, one chunk of an all-to-all or
            a reduction (a rank's share).
        step: the group's step since the last reset, from 0.
        source, target: group ranks of the message's two ends; ``None`` where all ranks' messages must be alike (an
            all-gather; the target of a broadcast).
    """

    key: str
    op: str
    dtype: torch.dtype
    numel: int
    step: int
    source: int | None = None
    target: int | None = None


CodecLike = str | dict[str, Any] | Codec


def check_mode(mode: str | None, codec: Codec | str | None = None) -> None:
    """Refuse a mode that does not exist, or that the codec beside it cannot have; ``None``: the group's own mode.

    Raises:
        ConfigError: as said.
    """
    if mode is not None and mode not in get_args(Mode):
        raise ConfigError(f"mode is 'wait' or 'predict-now', got {mode!r}")
    if mode == _PREDICTS and codec == PASS:
        raise ConfigError(
            "mode='predict-now' needs a history to predict from, and a call that passes through keeps none"
        )
    if mode == _PREDICTS and isinstance(codec, Codec) and codec.lossless:
        raise ConfigError(
            f"mode='predict-now' needs a history to predict from, and codec {codec!r} keeps none: name another codec, "
            "or leave the mode out"
        )


@dataclass(frozen=True, slots=True)
class Answer:
    """What a policy function returns for a call where it chooses the mode as well.

    Attributes:
        codec: a codec, ``"pass"``, or ``None`` for the group's own.
        mode: ``"wait"`` or, for an all-gather, ``"predict-now"``; ``None`` for the group's own.

    Raises:
        ConfigError: an impossible mode. UnknownCodecError, CodecConfigError: there is no such codec.
    """

    codec: CodecLike | None = None
    mode: Mode | None = None

    def __post_init__(self) -> None:
        if self.codec is not None and self.codec != PASS:
            object.__setattr__(self, "codec", codecs.get(self.codec))
        check_mode(self.mode, self.codec)  # type: ignore[arg-type]


Policy = Callable[[CallInfo], "CodecLike | Answer | None"]
"""Returns a codec, ``"pass"`` to let the call pass through, ``None`` for the group's own, or an :class:`Answer`."""


@dataclass(frozen=True)
class Rule:
    """One line of a policy: conditions that must all hold, and what to do then.

    Attributes:
        codec: a codec, or ``"pass"``; ``None``: the group's own.
        key: glob over the key (``*`` crosses slashes), e.g. ``"*attn*"``.
        op: ``"all_gather"``, ``"all_to_all"``, ``"send"``, ``"broadcast"``, ``"all_reduce"`` or ``"reduce_scatter"``,
            else ``wrap`` refuses; ``None`` for any. The last two are compressed only where a rule names a codec.
        dtype: a torch dtype or its name, such as ``"bfloat16"``; ``None`` for any.
        min_numel, max_numel: inclusive bounds on elements.
        first_step, last_step: inclusive bounds on the step since reset.
        between: pairs of group ranks, ``((0, 4), (1, 5))``: messages between the two ranks of a pair, either way;
            ``None`` for any. Messages that all ranks receive belong to no pair.
        mode: ``"wait"`` or ``"predict-now"``, which needs ``op="all_gather"``; ``None``: the group's own.

    Raises:
        ConfigError: an impossible condition or mode. UnknownCodecError: an unknown codec.
    """

    codec: CodecLike | None
    key: str = "*"
    op: str | None = None
    dtype: torch.dtype | str | None = None
    min_numel: int = 0
    max_numel: int | None = None
    first_step: int = 0
    last_step: int | None = None
    between: Sequence[tuple[int, int]] | None = None
    mode: Mode | None = None
    _resolved: Codec | None = field(init=False, repr=False, compare=False, default=None)

    def __post_init__(self) -> None:
        if not isinstance(self.key, str):
            raise ConfigError(f"a rule's key is a glob over keys, such as '*attn*', got {self.key!r}")
        object.__setattr__(self, "dtype", _dtype_of(self.dtype))
        _check_bound("min_numel", self.min_numel)
        _check_bound("first_step", self.first_step)
        for name, bound in (("max_numel", self.max_numel), ("last_step", self.last_step)):
            if bound is not None:
                _check_bound(name, bound, " or None")
        if self.max_numel is not None and self.max_numel < self.min_numel:
            raise ConfigError(f"rule matches nothing: max_numel {self.max_numel} < min_numel {self.min_numel}")
        if self.last_step is not None and self.last_step < self.first_step:
            raise ConfigError(f"rule matches nothing: last_step {self.last_step} < first_step {self.first_step}")
        if self.between is not None:
            given = self.between if isinstance(self.between, Iterable) else ()
            pairs = tuple(tuple(pair) if _is_pair(pair) else pair for pair in given)
            if not pairs or not all(map(_is_pair, pairs)):
                raise ConfigError(
                    "a rule's between holds pairs of two different group ranks, as ((0, 1), (2, 3)), got "
                    f"{self.between!r}"
                )
            object.__setattr__(self, "between", pairs)
        if self.codec is not None and self.codec != PASS:
            object.__setattr__(self, "_resolved", codecs.get(self.codec))
        check_mode(self.mode, self._resolved or self.codec)  # type: ignore[arg-type]
        if self.mode == _PREDICTS and self.op != "all_gather":
            raise ConfigError(
                f"a rule with mode='predict-now' says op='all_gather', for no other operation can be answered with its "
                f"prediction; got op={self.op!r}"
            )

    def matches(self, call: CallInfo) -> bool:
        """Whether all conditions hold."""
        return (
            (self.op is None or self.op == call.op)
            and (self.dtype is None or self.dtype == call.dtype)
            and call.numel >= self.min_numel
            and (self.max_numel is None or call.numel <= self.max_numel)
            and call.step >= self.first_step
            and (self.last_step is None or call.step <= self.last_step)
            and (self.between is None or self._is_between(call.source, call.target))
            and (self.key == "*" or fnmatch.fnmatchcase(call.key, self.key))
        )

    def _is_between(self, source: int | None, target: int | None) -> bool:
        assert self.between is not None
        return any((source, target) in ((a, b), (b, a)) for a, b in self.between)

    @property
    def result(self) -> CodecLike | Answer | None:
        """What a policy function would return in this rule's place."""
        chosen = PASS if self.codec == PASS else self._resolved
        return chosen if self.mode is None else Answer(chosen, self.mode)


def _check_bound(name: str, bound: object, otherwise: str = "") -> None:
    if isinstance(bound, bool) or not isinstance(bound, int) or bound < 0:
        raise ConfigError(f"a rule's {name} is a whole number from 0 on{otherwise}, got {bound!r}")


def _dtype_of(given: object) -> torch.dtype | None:
    if given is None:
        return None
    found = getattr(torch, given, None) if isinstance(given, str) else given
    if isinstance(found, torch.dtype):
        return found
    raise ConfigError(f"a rule's dtype is one of torch's, or its name, such as 'bfloat16'; got {given!r}")


def _is_pair(pair: object) -> bool:
    if not isinstance(pair, list | tuple) or len(pair) != 2 or pair[0] == pair[1]:
        return False
    return all(isinstance(rank, int) and not isinstance(rank, bool) and rank >= 0 for rank in pair)


class Rules:
    """The first matching rule decides; without one the group's own codec does.

    >>> policy = Rules(Rule("pass", key="*norm*"), Rule("int8", last_step=3))

    Attributes:
        rules: in order.
        decided: which of them, by number, have decided some call.
    """

    def __init__(self, *rules: Rule) -> None:
        self.rules = rules
        self.decided: set[int] = set()

    def __call__(self, call: CallInfo) -> CodecLike | Answer | None:
        """The first matching rule's answer, or ``None``."""
        for number, rule in enumerate(self.rules):
            if rule.matches(call):
                self.decided.add(number)
                return rule.result
        return None

    def __repr__(self) -> str:
        return f"Rules({', '.join(map(repr, self.rules))})"


def as_policy(policy: Policy | Sequence[Rule] | Rule | None) -> Policy | None:
    """Accept a function, a rule, or a sequence of rules.

    Raises:
        ConfigError: anything else.
    """
    if policy is None or callable(policy):
        return policy
    if isinstance(policy, str | Codec) or (isinstance(policy, Mapping) and "id" in policy):
        raise ConfigError(
            f"policy={policy!r} is a codec: codec={policy!r} gives it to every site, "
            f"policy=Rule({policy!r}, key='*attn*') to some"
        )
    rules = (policy,) if isinstance(policy, Rule) else tuple(policy) if isinstance(policy, Iterable) else (policy,)
    if not all(isinstance(rule, Rule) for rule in rules):
        raise ConfigError(
            "policy is a function of CallInfo, a Rule, or a sequence of Rules, as "
            f"[Rule('int8', key='*attn*'), Rule('pass', op='send')]; got {policy!r}"
        )
    return Rules(*rules)


def rules_from_json(text: str) -> list[Rule]:
    """Rules from a JSON list of their fields: ``[{"codec": "int8:scales=block", "key": "*kv*", "dtype": "float16"}]``.

    Raises:
        ConfigError: no list of rules. UnknownCodecError, CodecConfigError: a rule's codec does not exist.
    """
    try:
        entries = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"rules are a JSON list, and this is not valid JSON: {error}") from None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ConfigError("rules are a JSON list of objects, one for each rule")
    rules = []
    for entry in entries:
        try:
            rules.append(Rule(**entry))
        except TypeError as error:
            raise ConfigError(f"a rule has the fields of compactdist.Rule: {error}") from None
    return rules


def describe_policy(policy: Policy | None) -> str:
    """A text that is equal on two ranks when their policies are, as far as text can tell (functions by name)."""
    if policy is None or isinstance(policy, Rules):
        return repr(policy)
    return f"{getattr(policy, '__module__', '?')}.{getattr(policy, '__qualname__', type(policy).__qualname__)}"
