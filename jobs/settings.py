"""Settings: the only reader of the environment in the whole project.

Owns every knob a deployment can turn, with its default and its meaning; prefix `NIGHTPRESS_`, nested by `__`
(`NIGHTPRESS_ENGINE__MAX_NUM_SEQS=64`). Knows nothing of how the values are used. With no variable set the
result is embedded mode: SQLite and a private Valkey server under `./.nightpress`.
"""

from __future__ import annotations

import os
from difflib import get_close_matches
from pathlib import Path
from typing import Final, Literal
from urllib.parse import quote, unquote, urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from engine.config import EngineConfig
from jobs.addresses import ADVICE, is_broker, is_database

_PREFIX: Final = "NIGHTPRESS_"
_DELIMITER: Final = "__"
REQUEST_GRACE_SECONDS: Final = 10  # for requests that an api is answering when it is told to stop


class EngineSettings(BaseModel):
    """The tunable part of `engine.config.EngineConfig`; the model comes from `Settings.model`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    revision: str | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    model_impl: Literal["auto", "nightpress", "transformers"] = Field(
        "auto", description="whose code computes the model; auto: ours where it knows the architecture"
    )
    kernels: Literal["auto", "reference", "cpu", "triton"] = "auto"
    page_size: int | None = None
    max_num_seqs: int = 256
    max_num_batched_tokens: int | None = None
    num_scheduler_steps: int | None = None
    num_speculative_tokens: int | None = None
    max_model_len: int | None = None
    max_num_requests: int | None = None
    kv_cache_memory_bytes: int | None = None
    kv_cache_dtype: Literal["auto", "int8", "fp8"] = Field(
        "auto",
        description="what the KV pages store; 8 bits hold nearly twice the tokens, a little less exactly",
    )
    quantization: Literal["int8"] | None = Field(
        None, description="int8: weights and activations are rounded to 8 bits for products; cpu only"
    )
    preemption_mode: Literal["auto", "recompute", "swap"] = Field(
        "auto", description="how a sequence whose pages were needed comes back; auto: what is faster"
    )
    swap_space_bytes: int | None = Field(
        None,
        description="host memory for swapped KV pages; none: on cuda up to 8 GiB of what is free, on cpu 0",
    )
    enable_prefix_caching: bool = True
    scheduling_policy: Literal["planned", "fcfs"] = "planned"
    reasoning_parser: Literal["auto", "none", "think", "harmony"] = Field(
        "auto", description="how a model marks what it thinks; auto: as the marks among its tokens say"
    )
    deterministic: bool | None = None
    threads: int | None = None

    def for_model(self, model: str) -> EngineConfig:
        return EngineConfig(model=model, **self.model_dump())


class Settings(BaseSettings):
    """All of a deployment. Times in seconds, sizes in bytes."""

    model_config = SettingsConfigDict(
        env_prefix=_PREFIX,
        env_nested_delimiter=_DELIMITER,
        extra="ignore",
        frozen=True,
        env_ignore_empty=True,
        protected_namespaces=(),
        hide_input_in_errors=True,  # there are passwords among them
    )

    data_dir: Path = Field(Path(".nightpress"), description="where embedded mode keeps SQLite and Valkey")
    files_dir: Path | None = Field(
        None, description="where uploaded and output files lie; none: data_dir/files"
    )
    database_url: str = Field(
        "", description="sqlite:///… or postgresql+psycopg://…; empty: SQLite in data_dir"
    )
    redis_url: str = Field(
        "", description="redis://…, rediss://… or unix:///path; empty: a private Valkey in data_dir"
    )
    model: str = Field("", description="folder of safetensors, GGUF file or hub id that workers serve")
    model_name: str = Field("", description="the name jobs use for it; empty: the last part of model")

    host: str = Field("127.0.0.1", description="address the API binds")
    port: int = Field(8000, ge=0, le=65535, description="port the API binds; 0: a free one")

    engine: EngineSettings = EngineSettings()

    lease_seconds: float = Field(15.0, gt=0, description="how long a silent worker keeps its jobs")
    renew_seconds: float = Field(
        5.0, gt=0, description="how often a worker renews its lease and hears of cancels"
    )
    sweep_seconds: float = Field(
        5.0, gt=0, description="how often expired leases and due schedules are looked for"
    )
    grace_seconds: float = Field(20.0, ge=0, description="how long a drain lets running jobs finish")
    stall_seconds: float = Field(
        120.0, gt=0, description="a busy engine without a step for so long is restarted"
    )
    start_seconds: float = Field(
        1800.0, gt=0, description="an engine that is not loaded after so long is restarted"
    )
    claim_window: int = Field(
        3, ge=1, le=16, description="jobs a worker may hold, in multiples of max_num_seqs"
    )
    checkpoint_seconds: float = Field(
        5.0, gt=0, description="how often the tokens of running jobs are saved, to go on from after a death"
    )

    max_body_bytes: int = Field(1_000_000, gt=0, description="largest body of a single job")
    max_array_bytes: int = Field(64_000_000, gt=0, description="largest body of a jobs array")
    max_array_jobs: int = Field(10_000, gt=0, description="most jobs in one array")
    max_file_bytes: int = Field(1_000_000_000, gt=0, description="largest file that may be uploaded")
    max_batch_jobs: int = Field(1_000_000, gt=0, description="most lines in the input file of a batch")
    max_n: int = Field(16, ge=1, le=128, description="most samples per job")
    interactive_seconds: float = Field(
        600.0,
        gt=0,
        description="how long a request that waits for its answer may take before it is cancelled",
    )
    default_max_tokens: int = Field(1024, ge=1, description="for jobs that name no max_tokens")

    quota_queued_jobs: int | None = Field(None, ge=0, description="most jobs of a tenant that have not ended")
    quota_queued_tokens: int | None = Field(None, ge=0, description="most estimated tokens of those jobs")
    quota_stored_bytes: int | None = Field(
        None, ge=0, description="most bytes of a tenant's bodies and outputs"
    )
    quota_tokens_per_day: int | None = Field(
        None, ge=0, description="most tokens billed to a tenant per UTC day"
    )

    promise_slack: float = Field(
        1.0, gt=0, description="how much longer than forecast a submit with a window is taken to need"
    )
    promise_refuse: bool = Field(
        True, description="whether a submit is refused whose window cannot be met as measured"
    )

    api_key: str = Field("", repr=False, description="the key that the command line's client sends")

    metrics_host: str = Field("127.0.0.1", description="address a worker's metrics port binds")
    metrics_port: int | None = Field(
        None, ge=0, le=65535, description="port of each worker's /metrics; 0: a free one, none: off"
    )

    log_level: Literal["debug", "info", "warning", "error"] = "info"

    @field_validator("database_url")
    @classmethod
    def _known_database(cls, url: str) -> str:
        if url.startswith(("postgres://", "postgresql://")):
            url = "postgresql+psycopg://" + url.split("://", 1)[1]
        if url and not url.startswith(("sqlite:///", "postgresql+psycopg://")):
            raise ValueError("must start with sqlite:/// or postgresql://")
        if url and not is_database(url):
            raise ValueError(f"cannot be read as postgresql://USER:PASSWORD@HOST:PORT/NAME; {ADVICE}")
        return url

    @field_validator("redis_url")
    @classmethod
    def _known_broker(cls, url: str) -> str:
        if url and not url.startswith(("redis://", "rediss://", "unix://")):
            raise ValueError("must start with redis://, rediss:// or unix://")
        if url and not is_broker(url):
            raise ValueError(
                f"cannot be read as redis://USER:PASSWORD@HOST:PORT/NUMBER or unix:///PATH?db=NUMBER; {ADVICE}"
            )
        return url

    @model_validator(mode="after")
    def _lease_outlives_renewal(self) -> Settings:
        if self.renew_seconds * 2 > self.lease_seconds:
            raise ValueError("renew_seconds must be at most half of lease_seconds")
        return self

    @property
    def embedded_broker(self) -> bool:
        return not self.redis_url

    @property
    def valkey_socket(self) -> Path:
        return self.data_dir.absolute() / "valkey.sock"

    @property
    def files(self) -> Path:
        """Folder of the files; all api processes must see the same one."""
        return (self.files_dir or self.data_dir / "files").absolute()

    @property
    def database(self) -> str:
        """SQLAlchemy URL."""
        return self.database_url or f"sqlite:///{self.data_dir.absolute() / 'nightpress.sqlite3'}"

    @property
    def database_path(self) -> Path | None:
        """The file of an SQLite database; None for others."""
        name = self.database.partition("sqlite:///")[2].partition("?")[0]
        return Path(name) if name and name != ":memory:" else None

    @property
    def redis(self) -> str:
        """redis-py URL."""
        return self.redis_url or f"unix://{quote(str(self.valkey_socket))}?db=0"

    @property
    def broker(self) -> str:
        """The same server as kombu spells it: unix sockets are `redis+socket://` with a virtual host."""
        parts = urlsplit(self.redis)
        if parts.scheme != "unix":
            return self.redis
        db = dict(pair.split("=", 1) for pair in parts.query.split("&") if "=" in pair).get("db", "0")
        return f"redis+socket://{unquote(parts.path)}?virtual_host={db}"

    @property
    def served_model(self) -> str:
        """The name that jobs give in their `model` field."""
        path = Path(self.model)
        if self.model and path.name in ("", ".."):  # a folder as seen from inside
            path = path.resolve()
        return self.model_name or path.name.removesuffix(".gguf")

    def engine_config(self) -> EngineConfig:
        return self.engine.for_model(self.model)


def unread_variables() -> dict[str, str | None]:
    """Variables that are named like ours and that no setting reads, each with the name that may be meant. Those of
    the engine are refused as they are read."""
    unread: dict[str, str | None] = {}
    for name in sorted(os.environ):
        ours = name.lower().removeprefix(_PREFIX.lower())
        field = ours.partition(_DELIMITER)[0]
        if name.upper().startswith(_PREFIX) and field not in Settings.model_fields:
            meant = get_close_matches(ours, Settings.model_fields, 1)
            unread[name] = _PREFIX + meant[0].upper() if meant else None
    return unread
