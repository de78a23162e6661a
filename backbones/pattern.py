"""Which mechanism each block has: one for all, or a pattern over depth such as "sana*3+softmax".

A pattern is parts joined by "+", each a mechanism or MECHANISM*COUNT. It repeats over the blocks,
and the last repetition may be cut. Options of a mixture stand under their mechanism.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from attnzoo import InvalidType, InvalidValue, UsageError, get_attention
from attnzoo.contract import Attention, AttentionContext, check_option, nearest

_SHAPE = "a pattern is mechanisms joined by +, each with *COUNT if it repeats: 'sana*3+softmax'"
_MOST = 10_000  # blocks of a repetition; no model has so many


@dataclass(frozen=True)
class Pattern:
    """The mechanisms of a model's blocks, from the first on; ``parse_pattern`` makes it.

    Attributes:
        parts: (mechanism, blocks in a row) of one repetition.
    """

    parts: tuple[tuple[str, int], ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The mechanisms, each once, in the order in which they first come."""
        return tuple(dict.fromkeys(name for name, _ in self.parts))

    @property
    def is_mixture(self) -> bool:
        """Whether there are several mechanisms."""
        return len(self.names) > 1

    @property
    def text(self) -> str:
        """The pattern in its shortest spelling."""
        return "+".join(name if count == 1 else f"{name}*{count}" for name, count in self.parts)

    @property
    def period(self) -> int:
        """Blocks of one repetition."""
        return sum(count for _, count in self.parts)

    def name_of(self, index: int) -> str:
        """The mechanism of block ``index``, from 0."""
        index %= self.period
        for name, count in self.parts:
            if index < count:
                return name
            index -= count
        raise AssertionError("an index below the period lies in one of the parts")

    def first_of(self, name: str) -> int:
        """The first block of a mechanism."""
        before = 0
        for other, count in self.parts:
            if other == name:
                return before
            before += count
        raise KeyError(name)

    def share_of(self, name: str) -> float:
        """How much of a repetition is of a mechanism."""
        return sum(count for other, count in self.parts if other == name) / self.period

    @property
    def least_depth(self) -> int:
        """Blocks that a model needs for every mechanism to come."""
        return 1 + max(map(self.first_of, self.names))

    def check(self) -> None:
        """Looks whether every mechanism exists.

        Raises:
            InvalidValue: A name is unknown; a mixture's error names the block.
        """
        for name in self.names:
            try:
                get_attention(name)
            except UsageError as error:
                raise self._at(self.first_of(name), error) from error

    def check_depth(self, depth: int) -> None:
        """Looks whether every mechanism comes in a model of this depth.

        Raises:
            InvalidValue: It is too shallow for one of them.
        """
        if self.is_mixture and depth < self.least_depth:
            last = max(self.names, key=self.first_of)
            raise InvalidValue(
                f"{self.text!r} has its first {last!r} in block {self.first_of(last)}, which a "
                f"model of depth={depth} does not have; take a depth of {self.least_depth} or "
                f"more, or a shorter pattern"
            )

    def options_of(self, options: Mapping[str, Any] | None) -> dict[str, dict[str, Any]]:
        """The options of each mechanism; those of a mixture stand under its mechanisms' names.

        Raises:
            InvalidType: Options of a mixture do not, or those of a single mechanism do.
            InvalidValue: They are of a mechanism that is not there.
        """
        options = dict(options or {})
        if not self.is_mixture:
            (name,) = self.names
            if isinstance(options.get(name), Mapping):
                raise InvalidType(
                    f"{name!r} is no mixture: its options stand without its name, got "
                    f"{name}={options[name]!r}"
                )
            return {name: options}
        for name, value in options.items():
            if name in self.names and isinstance(value, Mapping):
                continue
            if name in self.names:
                raise InvalidType(
                    f"options of {name!r} in {self.text!r} are a dict, as {{{name!r}: {{}}}}, "
                    f"got {name}={value!r}"
                )
            owner, dot, option = str(name).rpartition(".")
            if isinstance(value, Mapping) or (dot and owner not in self.names):
                raise InvalidValue(
                    f"{self.text!r} has no {owner or name!r}, for which options are given"
                    f"{nearest(owner or name, self.names)} It mixes {', '.join(self.names)}"
                )
            owner = owner or next(filter(lambda z: _has(z, option), self.names), self.names[0])
            raise InvalidType(
                f"an option of {self.text!r} stands under its mechanism, as {{{owner!r}: "
                f"{{{option!r}: ...}}}} or --set {owner}.{option}=...; got {name}={value!r}"
            )
        return {name: dict(options.get(name, {})) for name in self.names}

    def heads_of(self, num_heads: Any) -> dict[str, int | None]:
        """The heads of each mechanism: one number for all, or by name.

        Raises:
            InvalidValue: A name is not there.
        """
        if not isinstance(num_heads, Mapping):
            return dict.fromkeys(self.names, num_heads)
        for name in num_heads:
            if name not in self.names:
                raise InvalidValue(
                    f"num_heads names {name!r}{nearest(name, self.names)} {self.text!r} has "
                    f"{', '.join(self.names)}"
                )
        return {name: num_heads.get(name) for name in self.names}

    def build(
        self, index: int, dim: int, num_heads: Any, depth: int, options: Mapping[str, Any] | None
    ) -> Attention:
        """The attention of block ``index``.

        Args:
            index: Of the block, from 0.
            dim: Width of the tokens.
            num_heads: See ``heads_of``.
            depth: Blocks of the network.
            options: See ``options_of``.

        Raises:
            attnzoo.UsageError: See ``attnzoo.build_attention``; a mixture's names the block.
        """
        name = self.name_of(index)
        heads, own = self.heads_of(num_heads)[name], self.options_of(options)[name]
        try:
            cls = get_attention(name)
            context = AttentionContext(dim=dim, num_heads=heads, layer_index=index, depth=depth)
            return cls(context, cls.Config.from_options(name, own))
        except UsageError as error:
            raise self._at(index, error) from error

    def _at(self, index: int, error: UsageError) -> UsageError:
        if not self.is_mixture:
            return error
        return type(error)(f"block {index} of {self.text!r}: {error}")


def _has(name: str, option: str) -> bool:
    return option in {field.name for field in dataclasses.fields(get_attention(name).Config)}


def parse_pattern(text: str) -> Pattern:
    """ "sana" or "sana*3+softmax" -> its parts; names are not looked up.

    Raises:
        InvalidType: It is no string.
        InvalidValue: It is no pattern.
    """
    check_option("attn", text, str)
    if not any(sign in text for sign in "*+"):
        return Pattern(((text, 1),))
    if re.search(r"\s", text):
        raise InvalidValue(f"{text!r} holds white space; write it without: {_SHAPE}")
    parts: list[tuple[str, int]] = []
    for part in text.split("+"):
        name, star, digits = part.partition("*")
        if not name:
            raise InvalidValue(f"{text!r} lacks a mechanism beside a sign; {_SHAPE}")
        if star and not (digits.isdecimal() and digits.isascii() and 0 < int(digits[:9]) <= _MOST):
            raise InvalidValue(
                f"{part!r} in {text!r} needs a count from 1 to {_MOST} after its *; {_SHAPE}"
            )
        count = int(digits) if star else 1
        if parts and parts[-1][0] == name:
            count += parts.pop()[1]
        parts.append((name, count))
    pattern = Pattern(tuple(parts))
    if not pattern.is_mixture:
        raise InvalidValue(
            f"{text!r} has one mechanism, which every block gets anyway: write {parts[0][0]!r}"
        )
    return pattern


def names_in(text: str) -> tuple[str, ...]:
    """The mechanisms of a pattern, each once."""
    return parse_pattern(text).names


def canonical_pattern(text: str) -> str:
    """The shortest spelling of what may be a pattern; anything else as it is."""
    try:
        return parse_pattern(text).text
    except InvalidValue:
        return text


def nested(options: Mapping[str, Any]) -> dict[str, Any]:
    """{"sana.eps": 1} -> {"sana": {"eps": 1}}; names without a dot stay.

    Raises:
        InvalidValue: A name is both an option and a mechanism.
    """
    found: dict[str, Any] = {}
    for name, value in options.items():
        owner, dot, option = name.rpartition(".")
        if not dot:
            found[name] = value
        elif isinstance(of_owner := found.setdefault(owner, {}), dict):
            of_owner[option] = value
        if dot and not isinstance(found[owner], dict):
            raise InvalidValue(f"{owner}={found[owner]!r} and {name}={value!r} exclude each other")
    return found


def dotted(options: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of ``nested``, as the command line and pictures write options."""
    found: dict[str, Any] = {}
    for name, value in options.items():
        if isinstance(value, Mapping):
            found |= {f"{name}.{option}": z for option, z in value.items()}
        else:
            found[name] = value
    return found


def file_name(text: str) -> str:
    """A mechanism, pattern or model as part of a file's name that no shell expands."""
    return re.sub(r"[*+/\s]+", "-", text)
