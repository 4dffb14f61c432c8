"""How to draw tokens: the settings and their rules. Imports no torch, so that ``--help`` answers at once."""

from dataclasses import dataclass
from typing import Any

from megatron_ds.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """How to draw tokens; ConfigError for values without meaning. ``temperature`` 0 takes the likeliest token."""

    max_new_tokens: int = 100
    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 1234
    num_samples: int = 1
    use_cache: bool = True

    def __post_init__(self) -> None:
        rules = [
            ("--max-new-tokens", self.max_new_tokens, self.max_new_tokens > 0, "at least 1"),
            ("--temperature", self.temperature, self.temperature >= 0, "at least 0 (0 takes the likeliest token)"),
            ("--top-k", self.top_k, self.top_k is None or self.top_k > 0, "at least 1, or left out"),
            ("--top-p", self.top_p, self.top_p is None or 0 < self.top_p <= 1, "above 0 and at most 1, or left out"),
            ("--num-samples", self.num_samples, self.num_samples > 0, "at least 1"),
        ]
        broken = [f"{flag} {value}: must be {rule}" for flag, value, holds, rule in rules if not holds]
        if broken:
            raise ConfigError("; ".join(broken))

    def options(self) -> dict[str, Any]:
        """Arguments of transformers' ``generate``; every one is set, since a directory's own defaults may differ."""
        greedy = self.temperature == 0
        drawn = {"temperature": self.temperature, "top_k": self.top_k or 0, "top_p": self.top_p or 1.0}
        return {
            "max_new_tokens": self.max_new_tokens,
            "use_cache": self.use_cache,
            "do_sample": not greedy,
            **(dict.fromkeys(drawn) if greedy else drawn),
        }
