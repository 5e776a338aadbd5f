"""ModelConfig: every number of a network, checked together before anything is allocated."""

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any, ClassVar, Self, TypeVar

from pydantic import Field, SerializerFunctionWrapHandler, create_model, model_serializer, model_validator

from model.attention.rope import Scaling
from model.attention.settings import PER_KIND, AttentionSettings
from model.attention.spec import AttentionSpec
from model.mixers import MIXERS
from model.mixers.base import MixerSpec, Place
from model.pattern import describe_layers, expand_pattern
from model.section import Section

C = TypeVar("C", bound=type[Section])


def with_mixer_sections(config: C) -> C:
    """The config class with a section [model.WORD] for each word whose mixer has settings of its own."""
    sections: Any = {
        word: (mixer.Settings, Field(mixer.Settings(), description=f"settings of {word} layers"))
        for word, mixer in MIXERS.items()
        if mixer.Settings is not None
    }
    same: Any = {"__base__": config, "__module__": config.__module__, "__doc__": config.__doc__}
    return create_model(config.__name__, **same, **sections)


@with_mixer_sections
class ModelConfig(AttentionSettings):
    """A network's shape. Frozen; building one that cannot work raises with the key and its value."""

    renamed: ClassVar[dict[str, str]] = {"without": "omits"}

    @model_validator(mode="after")
    def _check(self) -> Self:
        self.check_shape()
        kinds = set(self.kinds)
        self._check_tables(kinds)
        self.check_attention(kinds)
        for kind in kinds:
            if "rope_base" in MIXERS[kind].per_kind:
                self.check_rope(kind)
        return self

    def _check_tables(self, kinds: set[str]) -> None:
        """Tables by kind of layer have a value for each kind that reads it, and for nothing else."""
        for key in PER_KIND:
            table = getattr(self, key)
            if isinstance(table, dict):
                if unknown := set(table) - set(MIXERS):
                    raise ValueError(f"{key}.{unknown.pop()} is not a kind of layer; the kinds are {', '.join(MIXERS)}")
                if missing := {kind for kind in kinds if key in MIXERS[kind].per_kind} - set(table):
                    raise ValueError(
                        f"{key} has no value for {missing.pop()} layers, which pattern ({self.pattern!r}) has"
                    )
        if isinstance(self.position, dict) and "learned" in self.position.values():
            raise ValueError("position = learned is one table for the whole model: it cannot be given by kind of layer")

    @model_serializer(mode="wrap")
    def _without_unused_sections(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Sections of words that the pattern does not have are not written."""
        return {key: value for key, value in dump(self).items() if key not in MIXERS or key in self.kinds}

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """The same with some settings changed, checked again."""
        given = {key: getattr(self, key) for key in self.model_fields_set}
        return type(self)(**given | dict(update or {}))

    @cached_property
    def kinds(self) -> tuple[str, ...]:
        """The word of each layer: the pattern tiled over depth and cut at n_layer."""
        words = expand_pattern(self.pattern, MIXERS)
        return tuple(words[i % len(words)] for i in range(self.n_layer))

    @cached_property
    def layers(self) -> tuple[MixerSpec, ...]:
        """The numbers of each layer's mixer."""
        kinds = self.kinds
        places = [Place(word=w, nth=kinds[:i].count(w), index=i, n_layer=self.n_layer) for i, w in enumerate(kinds)]
        return tuple(MIXERS[place.word].spec_from(self, place) for place in places)

    @property
    def applied_layers(self) -> tuple[MixerSpec, ...]:
        """The layers in the order in which a token goes through them, each loop with states of its own."""
        return self.layers * self.loops

    def describe(self) -> str:
        """The layers, short: "swa*5 full", or "full*4, 3 loops"; those that are not causal are marked."""
        marked = [spec.kind if spec.causal else f"{spec.kind}(not causal)" for spec in self.layers]
        return describe_layers(marked) + (f", {self.loops} loops" if self.loops > 1 else "")

    def sliding(self, window: int, n_sink: int, *, rope_in_cache: bool = False) -> Self:
        """The same weights with every layer sliding, whatever it was trained as. Raises as building does."""
        return self.model_copy(update={"window_everywhere": window, "n_sink": n_sink, "rope_in_cache": rope_in_cache})

    def stretched(self, scaling: Scaling, factor: float) -> Self | None:
        """The same weights with RoPE extended beyond block_size in layers without a window; None if there are none.

        Layers with a window need no extension: no distance in them exceeds it.
        """
        free = {
            kind
            for kind, spec in zip(self.kinds, self.layers, strict=True)
            if isinstance(spec, AttentionSpec) and spec.rope and spec.window is None and spec.rope.scaling == "none"
        }
        if not free:
            return None
        reads = lambda key: {kind for kind in self.kinds if key in MIXERS[kind].per_kind}
        own = lambda key, new: {kind: new if kind in free else self.per_kind(key, kind) for kind in reads(key)}
        changes = {"rope_scaling": own("rope_scaling", scaling), "rope_factor": own("rope_factor", factor)}
        return self.model_copy(update=changes | {"rope_trained": self.rope_trained or self.block_size})

    def notes(self) -> Iterator[str]:
        """What is allowed and probably not meant, one line each."""
        parts = [part for spec in self.layers for part in getattr(spec, "parts", (spec,))]
        windows = [part.window for part in parts if isinstance(part, AttentionSpec) and part.window is not None]
        if self.window is not None and "swa" not in self.kinds:
            yield f"window ({self.window}) is used by no layer: pattern ({self.pattern!r}) has no swa"
        if self.n_sink and not windows:
            yield f"n_sink ({self.n_sink}) is used by no layer: pattern ({self.pattern!r}) has no swa"
        if windows and min(windows) >= self.block_size:
            yield f"window ({min(windows)}) covers block_size ({self.block_size}): in training every layer sees all"
        for word in MIXERS.keys() & self.model_fields_set:
            if word not in self.kinds:
                yield f"[model.{word}] is used by no layer: pattern ({self.pattern!r}) has no {word}"
        if kinds := {spec.kind for spec in self.layers if not spec.causal}:
            yield f"{', '.join(sorted(kinds))} layers are not causal: their losses say nothing about generating text"
