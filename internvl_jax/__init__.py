"""InternVL-Chat-V1-1 in JAX/Flax for TPU: load a checkpoint, chat about images, verify the numbers."""

from typing import Any

__all__ = ["Chat", "Reply", "__version__", "load"]


def __getattr__(name: str) -> Any:
    # Lazily, so that host-only packages (processing, the data workers, `internvl-jax --help`) do not import jax.
    if name == "__version__":
        import importlib.metadata

        return importlib.metadata.version("internvl-jax")
    if name in __all__:
        from internvl_jax.inference import chat, loading

        return loading.load if name == "load" else getattr(chat, name)
    raise AttributeError(f"module 'internvl_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
