"""The frozen base from a folder, and the adapter on it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.utils import logging as transformers_logging

from backends.cuda.attention import ATTENTION
from backends.cuda.fused import fuse
from backends.cuda.lora import LoraLinear, LoraPair
from backends.cuda.moe import attach_sparse, is_sparse
from backends.cuda.nf4 import keep_packing
from backends.cuda.streaming import Pieces, Source, load_in_pieces
from core.adapter import HEAD, LORA_A, LORA_B, Adapter
from core.architecture import Architecture, read_architecture
from core.config import ModelConfig
from core.errors import UserError
from core.models.reference import original_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from core.models import ResolvedModel

log = logging.getLogger("twinkeel")

NAMES_SHOWN = 3


def load_base(
    model: ResolvedModel,
    config: ModelConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
    num_left_out: int = 0,
    stream: bool = False,
    source: Source | None = None,
) -> tuple[PreTrainedModel, Pieces | None]:
    """Reads the weights, to `device`, frozen: in NF4 (double quantisation) for 4 bits, else in `dtype`.

    Args:
        num_left_out: of so many layers from the lowest no weights are kept.
        stream: leave the other layers' weights in host memory.
        source: where a mixture's weights come from for 4 bits; None: the model folder.

    Returns:
        The model, and what reads its pieces again; None if transformers read it whole.

    Raises:
        UserError: a family this backend doesn't know, or missing, damaged or misshapen weights.
    """
    architecture = _readable(model)
    pieces: Pieces | None = None
    if num_left_out or stream or (config.bits == 4 and architecture.is_moe):
        base, pieces = load_in_pieces(
            model,
            config,
            device=device,
            dtype=dtype,
            attention=ATTENTION,
            source=source,
            left_out=range(num_left_out),
            on_host=range(num_left_out, architecture.num_layers) if stream else range(0),
        )
    else:
        assert source is None, "weights from elsewhere are for a mixture in 4 bits"
        base, info = _read(model, _load_options(config, device, dtype))
        _check_loaded(model, info, _misshapen_quantised(base))
        if config.bits == 4:
            _to_compute_type(base, dtype)
    base.requires_grad_(False)
    if config.bits == 4:
        keep_packing(base)
    fuse(base)
    return base, pieces


def _readable(model: ResolvedModel) -> Architecture:
    """What the model is. Raises: UserError: its weights are MLX's."""
    architecture = read_architecture(Path(model.path))
    if architecture.mlx_bits is not None:
        raise UserError(
            f"{model.name}: the weights are {architecture.mlx_bits}-bit MLX weights, which only MLX can read",
            hint="use --backend mlx, or give the original model: --model " + (original_of(model.name) or "ORIGINAL"),
        )
    silence_libraries()
    return architecture


def silence_libraries() -> None:
    """No progress bars or chatter from transformers: what matters, this backend says itself."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def _load_options(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    options: dict[str, Any] = {
        "dtype": dtype,
        "device_map": {"": device},
        "attn_implementation": ATTENTION,
        "use_safetensors": True,
        "local_files_only": True,
    }
    if config.trust_remote_code:
        options["trust_remote_code"] = True
    if config.bits == 4:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    return options


def _read(model: ResolvedModel, options: dict[str, Any]) -> tuple[PreTrainedModel, dict[str, Any]]:
    from safetensors import SafetensorError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # mismatched sizes are let through here and refused by name in _check_loaded
            base, info = AutoModelForCausalLM.from_pretrained(
                model.path, output_loading_info=True, ignore_mismatched_sizes=True, **options
            )
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        if "DefaultCPUAllocator" in str(error):
            raise
        raise UserError(
            f"{model.name}: can't be loaded: {_first_line(error)}", hint="download the model again"
        ) from None
    return base, info


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _misshapen_quantised(base: PreTrainedModel) -> list[str]:
    """Packed 4-bit weights whose unpacked shape is not their layer's: transformers compares none of them."""
    found = []
    for name, module in base.named_modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None and tuple(state.shape) != (module.out_features, module.in_features):
            found.append(f"{name}.weight")
    return found


def _to_compute_type(base: PreTrainedModel, dtype: torch.dtype) -> None:
    """Of a folder that is quantised already, transformers leaves all that is not packed in the folder's own type."""
    for module in base.modules():
        if hasattr(module, "compute_dtype"):
            module.compute_dtype = dtype
    for parameter in base.parameters():
        is_packed = getattr(parameter, "quant_state", None) is not None
        if parameter.is_floating_point() and not is_packed:
            parameter.data = parameter.data.to(dtype)


def _check_loaded(model: ResolvedModel, info: dict[str, Any], misshapen: list[str]) -> None:
    """transformers fills a tensor that it does not find with random numbers and goes on; here that is an error."""
    for what, names in (
        ("have no", info["missing_keys"]),
        ("have the wrong shape for", [*misshapen, *(key[0] for key in info["mismatched_keys"])]),
    ):
        if names:
            raise UserError(
                f"{model.name}: the weights {what} {_listed(names)}",
                hint="download the model again, or check that config.json belongs to these weights",
            )
    if info["unexpected_keys"]:
        log.warning(
            "%s: tensors that this model has no use for: %s",
            model.name,
            _listed(info["unexpected_keys"]),
        )


def _listed(names: Iterable[str]) -> str:
    ordered = sorted(names)
    more = f" and {len(ordered) - NAMES_SHOWN} more" if len(ordered) > NAMES_SHOWN else ""
    return ", ".join(ordered[:NAMES_SHOWN]) + more


def put_adapter(base: PreTrainedModel, adapter: Adapter) -> dict[str, torch.nn.Parameter]:
    """Puts LoRA matrices with the values of `adapter` into `base`; they are float32 and all that trains.

    They go where the embeddings are, which may not be where a layer's own weights are.

    Dense modules are `backends.cuda.lora`'s; experts and routers, which transformers 5 keeps as bare parameters, are
    `backends.cuda.moe`'s: PEFT would build every expert's whole delta at each forward pass and allows no dropout there.

    Returns:
        The trained parameters under the adapter's neutral names, in its order.

    Raises:
        UserError: the model lacks a module that the adapter is for.
    """
    if HEAD in adapter.modules:
        raise UserError(f"an adapter on {HEAD} can't be trained", hint="it can be carried, with: python cli.py convert")
    sparse = [name for name in adapter.modules if is_sparse(name)]
    dense = [name for name in adapter.modules if not is_sparse(name)]
    known = dict(base.named_modules())
    if lacking := [name for name in dense if name not in known]:
        raise UserError(f"the adapter is for modules that this model lacks: {_listed(lacking)}")
    base.requires_grad_(False)
    found = {**_attach_dense(base, adapter, dense), **attach_sparse(base, adapter, sparse)}
    parameters = {name: found[name] for name in adapter.tensors}
    device = base.get_input_embeddings().weight.device
    for name, parameter in parameters.items():
        value = torch.from_numpy(adapter.tensors[name].copy())
        assert parameter.shape == value.shape, f"{name} is {tuple(parameter.shape)}"
        parameter.data = value.to(device)
        parameter.requires_grad_(True)
    return parameters


def _attach_dense(base: PreTrainedModel, adapter: Adapter, names: list[str]) -> dict[str, torch.nn.Parameter]:
    """Puts a pair beside each of the named linear layers; returns its parameters under their neutral names."""
    found = {}
    for name in names:
        parent_path, _, leaf = name.rpartition(".")
        parent: Any = base.get_submodule(parent_path)
        linear, pair = getattr(parent, leaf), LoraPair(adapter, name)
        expected = ((pair.a.shape[0], linear.in_features), (linear.out_features, pair.b.shape[1]))
        assert (pair.a.shape, pair.b.shape) == expected, f"the adapter of {name} is {pair.a.shape}, {pair.b.shape}"
        setattr(parent, leaf, LoraLinear(linear, pair, adapter.dropout))
        found[f"{name}.{LORA_A}"], found[f"{name}.{LORA_B}"] = pair.a, pair.b
    return found


def enable_checkpointing(base: PreTrainedModel) -> None:
    """Recomputes each layer in the backward pass, with the same dropout masks (torch restores a GPU's generator)."""
    # transformers 5.23 renamed it and warns of the old name
    for name in ("activation_checkpointing_enable", "gradient_checkpointing_enable"):
        if hasattr(base, name):
            getattr(base, name)({"use_reentrant": False})
            # It makes the embeddings ask for a gradient, which only the reentrant kind needs: with it, the backward
            # pass would recompute and cross the frozen layers below the lowest adapter as well.
            base.disable_input_require_grads()
            return
    raise AssertionError("transformers has no gradient checkpointing")
