"""Prometheus metrics, with vLLM's names under this project's prefix."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from internvl_jax.serving.requests import Output
from internvl_jax.serving.settings import EngineStats

PREFIX = "internvl_jax"
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


class HasStats(Protocol):
    """What is read from the engine."""

    @property
    def stats(self) -> EngineStats:
        """A snapshot."""
        ...

    @property
    def compiles(self) -> int:
        """Programs that were compiled since the warm-up."""
        ...


class Metrics:
    """The metrics of one server.

    Args:
        engine: where its counters and gauges come from.
        model: the model's name, a label of each metric.
    """

    def __init__(self, engine: HasStats, model: str):
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(engine, model))
        self._model = model

        def histogram(name: str, text: str, buckets: tuple[float, ...] = SECONDS) -> Histogram:
            whole = Histogram(f"{PREFIX}_{name}", text, ["model_name"], buckets=buckets, registry=self._registry)
            return whole.labels(model)

        self._first_token = histogram("time_to_first_token_seconds", "From the request's arrival to its first token.")
        self._token = histogram("inter_token_latency_seconds", "Between tokens of an answer.", TOKEN_SECONDS)
        self._whole = histogram("e2e_request_latency_seconds", "From the request's arrival to the end of its answer.")
        self._queue = histogram("request_queue_time_seconds", "From the arrival until the prompt is taken up.")
        self._prefill = histogram("request_prefill_time_seconds", "From then to the first token.")
        self._decode = histogram("request_decode_time_seconds", "From then to the end of the answer.")
        names = ["model_name", "finished_reason"]
        self._success = Counter(f"{PREFIX}_request_success", "Finished answers.", names, registry=self._registry)
        self._failure = Counter(
            f"{PREFIX}_request_failure",
            "Answers that ended early: cancelled, deadline, error, or empty (no token at all).",
            names,
            registry=self._registry,
        )
        self._refused = Counter(
            f"{PREFIX}_request_refused", "Requests answered with an error.", ["model_name", "status"],
            registry=self._registry,
        )  # fmt: skip

    def refused(self, status: int) -> None:
        """Count a request that was answered with an error."""
        self._refused.labels(self._model, str(status)).inc()

    def finished(self, outcome: str, *, success: bool) -> None:
        """Count an answer by why it ended. An answer without a token is no success."""
        (self._success if success else self._failure).labels(self._model, outcome).inc()

    def clock(self) -> AnswerClock:
        """A clock for one answer, whose request has just arrived."""
        return AnswerClock(self)

    def page(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)

    def observe_tokens(self, seconds: float, count: int) -> None:
        """Tokens that arrived together, and the time since those before them."""
        for _ in range(count):
            self._token.observe(seconds / count)

    def observe_first_token(self, seconds: float) -> None:
        """The time to a first token."""
        self._first_token.observe(seconds)

    def observe_end(self, output: Output, seconds: float) -> None:
        """The times of a finished answer."""
        self._whole.observe(seconds)
        if output.timings is not None:
            self._queue.observe(output.timings.queued)
            self._prefill.observe(output.timings.prefill)
            self._decode.observe(output.timings.decode)


class AnswerClock:
    """Measures one answer."""

    def __init__(self, metrics: Metrics):
        self._metrics = metrics
        self._arrived = time.monotonic()
        self._last: float | None = None

    def observe(self, output: Output) -> None:
        """An output has arrived."""
        now = time.monotonic()
        if output.tokens and self._last is None:
            self._metrics.observe_first_token(now - self._arrived)
            self._last = now
        elif output.tokens and self._last is not None:
            self._metrics.observe_tokens(now - self._last, len(output.tokens))
            self._last = now
        if output.finish_reason is not None:
            self._metrics.observe_end(output, now - self._arrived)


class _EngineCollector(Collector):
    """Reads the engine's counters and gauges when they are asked for."""

    def __init__(self, engine: HasStats, model: str):
        self._engine, self._model = engine, model

    def collect(self) -> Iterable[Metric]:
        stats = self._engine.stats
        gauges = {
            "num_requests_running": ("Requests in the running batch.", stats.running),
            "num_requests_waiting": ("Requests that wait for a row.", stats.waiting),
            "kv_cache_usage_perc": ("Used part of the KV cache, 0 to 1.", stats.cache_usage),
            "compiles_since_warm_up": ("Programs that were compiled since the warm-up.", self._engine.compiles),
        }
        counters = {
            "prompt_tokens": ("Tokens of prompts.", stats.prompt_tokens),
            "generation_tokens": ("Tokens of answers.", stats.generated_tokens),
            "prefix_cache_queries": ("Tokens looked up in the prefix cache.", stats.prefix_queries),
            "prefix_cache_hits": ("Tokens found there.", stats.prefix_hits),
            "mm_cache_queries": ("Images looked up in the cache of features.", stats.image_queries),
            "mm_cache_hits": ("Images found there.", stats.image_hits),
        }
        for name, (text, value) in gauges.items():
            gauge = GaugeMetricFamily(f"{PREFIX}_{name}", text, labels=["model_name"])
            gauge.add_metric([self._model], value)
            yield gauge
        for name, (text, value) in counters.items():
            counter = CounterMetricFamily(f"{PREFIX}_{name}", text, labels=["model_name"])
            counter.add_metric([self._model], value)
            yield counter
