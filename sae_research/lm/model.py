"""The language model under study: activations at a hook, logits, and logits from edited activations."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from sae_research.lm.hooks import HookPoint, find_layers, locate
from sae_research.lm.parts import MLPInput, Parts, find_mlp_input, find_parts
from sae_research.lm.past import Past
from sae_research.lm.placement import in_parts, main_device
from sae_research.lm.products import use_onednn
from sae_research.runtime.errors import UserError

_RAISED = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError)
"""What a model raises that does not run as it is asked to."""


class _Stop(Exception):
    """Raised inside a hook once its activations are taken: later layers must not run."""


class _StandIn(nn.Module):
    """Takes the place of a layer: returns its input, or given activations, in the layer's own return shape."""

    def __init__(self, layer: nn.Module, more: int | None, activations: Tensor | None = None) -> None:
        """more: how many values the layer returns beside its output; None where it returns no tuple."""
        super().__init__()
        self.__dict__["layer"] = layer  # not registered: its attributes are read, it never runs
        self.more = more
        self.activations = activations
        self.calls = 0

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["layer"], name)

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        self.calls += 1
        out = hidden_states if self.activations is None else self.activations
        return out if self.more is None else (out, *[None] * self.more)


class LanguageModel:
    """A Hugging Face decoder behind TransformerLens hook names. Everything runs without gradients, but that `resume`
    lets them through to the activations it is given.

    tokens are [batch, seq] ids, padded on the right where at all: attention is causal, so padding changes no
    real token.
    """

    def __init__(self, model: Any, tokenizer: Any, name: str, fingerprint: str) -> None:
        self.model = model.eval().requires_grad_(False)
        use_onednn(model)
        self.tokenizer = tokenizer
        self.name = name
        self.fingerprint = fingerprint
        self.names: tuple[str, ...] = (name,)
        """Names that mean this model: as it was asked for, and what its folder's path says."""
        self.loading: Any = None
        """What must stay as long as the model does."""
        self.saved_from = ""
        """What the folder's config says that it was saved from: the model itself, or one that it was finetuned from."""
        config = model.config.get_text_config()
        if not (hasattr(config, "hidden_size") and hasattr(config, "num_hidden_layers")):
            raise UserError(f"{name}: {type(model).__name__} says neither its width nor its layers; it is not supported")
        self.d_model: int = config.hidden_size
        self.n_layers: int = config.num_hidden_layers
        self.max_tokens = _max_tokens(config)
        self.vocab_size: int = model.get_input_embeddings().weight.shape[0]
        self.layers = find_layers(model, self.n_layers)
        self.separator_id = _separator_id(tokenizer)
        self._parts: dict[int, Parts] = {}
        self._mlp_inputs: dict[int, MLPInput] = {}
        self._shape = torch.Size(())  # [batch, seq] of the pass under way
        self._returned_beside: int | None = None
        self.can_resume = True
        self._keeps_positions = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.in_parts = in_parts(model)
        """Whether layers lie on several devices, or on disk."""
        self._check_runs()

    @property
    def device(self) -> torch.device:
        """Where tokens go in, and where activations and logits come out, also of a model in parts."""
        return main_device(self.model)

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def special_ids(self) -> Tensor:
        """Ids that never count: the tokenizer's special tokens and the document separator."""
        ids = {*self.tokenizer.all_special_ids, self.separator_id}
        return torch.tensor(sorted(ids), device=self.device)

    def d_in(self, hook: str) -> int:
        """Width of the activations at a hook. Raises `UserError` for a hook the model lacks."""
        point = self._point(hook)
        if point.kind == "attn.hook_z":
            module: Any = point.module
            if hasattr(module, "in_features"):  # a quantised weight has another shape
                return module.in_features
            weight: Any = getattr(module, "weight", None)
            if not isinstance(weight, Tensor) or weight.dim() != 2:
                raise UserError(
                    f"hook {hook}: {type(module).__name__} after attention has no weight that says how wide it is"
                )
            return weight.shape[0] if type(point.module).__name__ == "Conv1D" else weight.shape[1]
        return self.d_model

    def is_output_of(self, module: str, hook: str) -> bool:
        """Whether what a hook has is what that part of its layer (`mlp`) puts out, neither normed nor scaled after. Raises
        `UserError` for a hook the model lacks."""
        point = self._point(hook)
        own = getattr(self.layers[point.layer], module, None)
        return own is point.module and not point.before and point.scale == 1.0

    # --- what it does ---

    @torch.no_grad()
    def activations(self, tokens: Tensor, hook: str, past: Any = None) -> Tensor:
        """Activations at `hook`. tokens: [batch, seq]. Returns [batch, seq, d_in]; later layers do not run.

        past: a `transformers` cache of what comes before `tokens`; this run adds to it.
        """
        taken: list[Tensor] = []

        def take(value: Tensor) -> Tensor:
            taken.append(value)
            raise _Stop

        with self._edit(self._point(hook), take):
            try:
                self._forward(tokens, past)
            except _Stop:
                return taken[0]
        raise UserError(f"hook {hook} never fired in {type(self.model).__name__}")

    @torch.no_grad()
    def activations_at(self, tokens: Tensor, hooks: Sequence[str]) -> dict[str, Tensor]:
        """Activations at several hooks, [batch, seq, d_in] each, from one pass that ends at the last of them."""
        taken: dict[str, Tensor] = {}

        def taker(hook: str) -> Callable[[Tensor], Tensor]:
            def take(value: Tensor) -> Tensor:
                taken[hook] = value
                if len(taken) == len(set(hooks)):
                    raise _Stop
                return value.clone()  # some families add to it in place

            return take

        points = {hook: self._point(hook) for hook in hooks}
        with ExitStack() as edits:
            for hook, point in points.items():
                edits.enter_context(self._edit(point, taker(hook)))
            try:
                self._forward(tokens)
            except _Stop:
                return taken
        missing = ", ".join(hook for hook in hooks if hook not in taken)
        raise UserError(f"hook {missing} never fired in {type(self.model).__name__}")

    @torch.no_grad()
    def logits(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """Next-token logits [batch, seq, vocab] in the model's precision; with `positions` [n], only theirs
        [batch, n, vocab]."""
        return self._forward(tokens, positions=positions)

    @torch.no_grad()
    def patched_logits(self, tokens: Tensor, hook: str, edit: Callable[[Tensor], Tensor]) -> Tensor:
        """Logits of a full run in which `edit` replaces the activations at `hook` [batch, seq, d_in]."""
        with self._counted_edit(hook, edit):
            return self._forward(tokens)

    def edited_logits(
        self,
        tokens: Tensor,
        edits: Mapping[str, Callable[[Tensor], Tensor]],
        positions: Tensor | None = None,
        past: Any = None,
    ) -> Tensor:
        """Logits [batch, seq, vocab] (or of `positions` [n] only) of a run in which the activations at each hook
        [batch, seq, d_in] pass through its edit. Every edit is checked to have happened once.

        Gradients flow back to what an edit returns, where that requires them. past: a `transformers` cache of what
        comes before `tokens`; this run adds to it.
        """
        for hook in edits:
            self._point(hook)  # a part that is looked for runs the model, which no other edit may see
        with ExitStack() as stack:
            for hook, edit in edits.items():
                stack.enter_context(self._counted_edit(hook, edit))
            return self._forward(tokens, past, positions)

    @torch.no_grad()
    def continued(self, tokens: Tensor, past: Past) -> Tensor:
        """Logits [batch, seq, vocab] of tokens that come after `past`, to which this run adds."""
        return self._forward(tokens, past)

    def resume(
        self,
        hook: str,
        activations: Tensor,
        tokens: Tensor,
        positions: Tensor | None = None,
        rest: Tensor | None = None,
        past: Past | None = None,
    ) -> Tensor:
        """Logits [batch, seq, vocab] as if the model had computed `activations` [batch, seq, d_in] at `hook`.

        `positions` [n]: only their logits are wanted [batch, n, vocab]. past: what comes before `tokens`. Gradients reach
        `activations` where those require them. At residual hooks the layers before do not run; elsewhere, and for
        architectures whose check at load failed, this is a full run with the activations patched in. rest: where `hook` is
        what the MLP adds, the stream leaving the layer (`added_to`) less that [batch, seq, d_model]; the layers before then
        do not run either.
        """
        if rest is not None and self.can_resume and (after := self.added_to(hook)) is not None:
            hook, activations = after, rest + activations
        point = self._point(hook)
        last = point.layer - 1 if point.kind == "hook_resid_pre" else point.layer
        with torch.set_grad_enabled(torch.is_grad_enabled() and activations.requires_grad):
            if not self.can_resume or last < 0 or not point.kind.startswith("hook_resid"):
                with self._counted_edit(hook, lambda _: activations):
                    return self._forward(tokens, past, positions)
            with self._stand_ins(last, activations.to(self.dtype)) as final:
                logits = self._forward(tokens, past, positions)
        if final.calls != 1:
            raise UserError(f"resuming at {hook}: layer {last} ran {final.calls} times, expected once")
        return logits

    def added_to(self, hook: str) -> str | None:
        """The residual hook at which the activations at `hook` are a summand, of which no other depends on them; None where
        there is none."""
        point = self._point(hook)
        return f"blocks.{point.layer}.hook_resid_post" if point.kind == "hook_mlp_out" else None

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor,
        n_tokens: int,
        hook: str | None = None,
        edit: Callable[[Tensor], Tensor] | None = None,
        past: Past | None = None,
    ) -> Tensor:
        """Greedy continuation [batch, n_tokens] of prompts of one length [batch, seq], without padding; with `past` of
        prompts' ends of one length.

        `edit` replaces the prompt's activations at `hook` [batch, seq, d_in]; generated tokens' stay the model's own.
        What follows an end-of-text token means nothing: the caller cuts there.
        """
        seq = tokens.shape[1]
        self._check_length(seq + n_tokens - 1 + (0 if past is None else past.get_seq_length()))
        with nullcontext() if hook is None or edit is None else self._counted_edit(hook, edit):
            last = {"logits_to_keep": 1} if self._keeps_positions else {}
            self._shape = tokens.shape
            options = {"use_cache": True} if past is None else past.options(seq)
            out = self.model(input_ids=tokens.to(self.device), **options, **last)
        ids = [out.logits[:, -1].argmax(-1)]
        while len(ids) < n_tokens:
            if past is None:
                options = {"use_cache": True, "past_key_values": out.past_key_values}
            else:
                options = past.options(1, seq + len(ids) - 1)
            out = self.model(input_ids=ids[-1][:, None], **options)
            ids.append(out.logits[:, -1].argmax(-1))
        return torch.stack(ids, dim=1)

    # --- how ---

    def _check_length(self, length: int) -> None:
        if self.max_tokens is not None and length > self.max_tokens:
            raise UserError(
                f"{self.name} has {self.max_tokens} positions, a context of {length} tokens was asked for; "
                "lower what sets its length (text.context_size, or the evaluation's context_length or seq_len)"
            )

    def _point(self, hook: str) -> HookPoint:
        return locate(self.layers, hook, self._parts_of, self._mlp_input_of)

    def _parts_of(self, layer: int) -> Parts:
        """What attention and MLP of a layer add to the stream, found and checked on a few tokens at the first use."""
        if layer not in self._parts:
            self._parts[layer] = find_parts(self.layers[layer], lambda: self._forward(self._few_tokens(2)))
        return self._parts[layer]

    def _mlp_input_of(self, layer: int) -> MLPInput:
        """What the MLP of a layer reads, found and checked likewise."""
        if layer not in self._mlp_inputs:
            parts = self._parts_of(layer)
            self._mlp_inputs[layer] = find_mlp_input(self.layers[layer], lambda: self._forward(self._few_tokens(2)), parts)
        return self._mlp_inputs[layer]

    def _few_tokens(self, rows: int = 1) -> Tensor:
        """Ids [rows, 8] to check on."""
        return (torch.arange(8 * rows, device=self.device) * 7 % self.vocab_size).view(rows, 8)

    def _forward(self, tokens: Tensor, past: Any = None, positions: Tensor | None = None) -> Tensor:
        """Logits [batch, seq, vocab], or those of `positions` [batch, n, vocab]; `past` is added to."""
        self._check_length(tokens.shape[1] + (past.get_seq_length() if past is not None else 0))
        options: dict[str, Any] = {"use_cache": False} if past is None else {"use_cache": True, "past_key_values": past}
        if isinstance(past, Past):
            options = past.options(tokens.shape[1])
        self._shape = tokens.shape
        if positions is None or not self._keeps_positions:
            logits = self.model(input_ids=tokens.to(self.device), **options).logits
            return logits if positions is None else logits[:, positions.to(self.device)]
        if not self.in_parts:
            return self.model(input_ids=tokens.to(self.device), **options, logits_to_keep=positions.to(self.device)).logits
        with self._kept(positions):  # the last layer may lie on another device than the positions
            return self.model(input_ids=tokens.to(self.device), **options).logits

    @contextmanager
    def _kept(self, positions: Tensor) -> Generator[None]:
        """Only `positions` [n] reach the output embedding."""

        def keep(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (args[0][:, positions.to(args[0].device)], *args[1:])

        handle = self.model.get_output_embeddings().register_forward_pre_hook(keep)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def _counted_edit(self, hook: str, edit: Callable[[Tensor], Tensor]) -> Generator[None]:
        """`_edit`, checked to have happened exactly once."""
        calls = 0

        def counted(value: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            return edit(value).to(value.dtype)

        with self._edit(self._point(hook), counted):
            yield
        if calls != 1:
            raise UserError(f"hook {hook} fired {calls} times in one pass of {type(self.model).__name__}, expected 1")

    @contextmanager
    def _edit(self, point: HookPoint, edit: Callable[[Tensor], Tensor]) -> Generator[None]:
        """Pass one module's input or output through `edit`, whatever the family's return shape and the module's device."""

        def here(value: Tensor) -> Tensor:
            return edit(value.to(self.device)).to(value.device)

        def read(value: Tensor) -> Tensor:
            """`edit` of what a module is given; an MLP may be given one row a token [batch * seq, d_model]."""
            if not point.kind.startswith(("mlp.", "ln2.")):
                return here(value)
            stream = value.reshape(*self._shape, -1)
            if point.affine is None:
                return here(stream).reshape(value.shape)
            normalised = point.affine.undo(stream)
            made = here(normalised)  # what was only looked at goes on without a rounding
            return value if torch.equal(made, normalised) else point.affine.apply(made).reshape(value.shape)

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            if args:
                return (read(args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": read(kwargs["hidden_states"])}

        def added(value: Tensor) -> Tensor:
            """`edit` of what the stream receives of a part, which may put out one row a token [batch * seq, d_model]."""
            stream = value.reshape(*self._shape, -1)
            if point.scale == 1:
                return here(stream).reshape(value.shape).clone()  # Falcon adds to it in place
            return here(stream * point.scale).reshape(value.shape) / point.scale

        def after(_: nn.Module, __: Any, output: Any) -> Any:
            return (added(output[0]), *output[1:]) if isinstance(output, tuple) else added(output)

        handle = (
            point.module.register_forward_pre_hook(before, with_kwargs=True)
            if point.before
            else point.module.register_forward_hook(after)
        )
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def _stand_ins(self, last: int, activations: Tensor) -> Generator[_StandIn]:
        """Layers 0 to `last` do nothing but the last, which answers with `activations`.

        The model itself runs as ever, so masks, positions and embeddings stay its own.
        """
        originals = [self.layers[i] for i in range(last + 1)]
        final = _StandIn(originals[-1], self._returned_beside, activations)
        try:
            for i, layer in enumerate(originals):
                self.layers[i] = final if i == last else _StandIn(layer, self._returned_beside)
            yield final
        finally:
            for i, layer in enumerate(originals):
                self.layers[i] = layer

    @torch.no_grad()
    def _check_runs(self) -> None:
        """Raises `UserError` for a model that does not run on a few tokens, one whose later tokens change earlier ones, and
        one whose layers do not hand on a residual stream."""
        tokens, middle = self._few_tokens(), self.n_layers // 2
        changed = tokens.clone()
        changed[0, -1] = tokens[0, 0]
        seen: list[tuple[Any, Any]] = []

        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            seen.append(((*args, *kwargs.values())[0], output))

        handles = [
            layer.register_forward_hook(note, with_kwargs=True) for layer in self.layers[max(0, middle - 1) : middle + 1]
        ]
        try:
            full, other = self._forward(tokens), self._forward(changed)
        except _RAISED as error:
            raise UserError(
                f"{self.name} does not run on {tokens.numel()} tokens: {type(error).__name__}: "
                f"{str(error).strip().partition(chr(10))[0]}"
            ) from None
        finally:
            for handle in handles:
                handle.remove()
        if len(seen) != 2 * len(handles):
            raise UserError(f"{self.name}: layer {middle} never ran alone; this architecture is not supported")
        outputs = [out[0] if isinstance(out, tuple) else out for _, out in seen]
        if len(handles) == 2 and not (
            isinstance(outputs[0], Tensor) and isinstance(seen[1][0], Tensor) and torch.equal(outputs[0], seen[1][0])
        ):
            raise UserError(
                f"{self.name}: layer {middle} does not read what layer {middle - 1} returns; this architecture "
                "is not supported"
            )
        if not (isinstance(outputs[-1], Tensor) and outputs[-1].shape == (*tokens.shape, self.d_model)):
            shape = list(outputs[-1].shape) if isinstance(outputs[-1], Tensor) else type(outputs[-1]).__name__
            raise UserError(
                f"{self.name}: layer {middle} returns {shape} for {tokens.numel()} tokens, not one vector of {self.d_model} "
                "a token; this architecture is not supported"
            )
        before, after = full[0, :-1].float(), other[0, :-1].float()
        rounding = 1e-4 if self.dtype == torch.float32 else 0.02
        if (after - before).norm() > rounding * before.norm():
            raise UserError(f"{self.name}: later tokens change what earlier ones predict; only causal models are supported")
        returned = seen[-1][1]
        self._returned_beside = len(returned) - 1 if isinstance(returned, tuple) else None
        self.can_resume = self._resumes(tokens, full, f"blocks.{middle}.hook_resid_post")

    def _resumes(self, tokens: Tensor, full: Tensor, hook: str) -> bool:
        """Whether resuming gives the logits `full` of a full run; where it does not, `resume` always runs in full."""
        activations = self.activations(tokens, hook)
        try:
            resumed = self.resume(hook, activations, tokens)
        except _RAISED:  # the model reads more of its layers than their output
            return False
        return torch.allclose(resumed.float(), full.float(), atol=1e-4, rtol=1e-4)


def _max_tokens(config: Any) -> int | None:
    """Tokens of the longest context the model is made for, by whatever name its config has for it; None for no limit."""
    limits = (getattr(config, key, None) for key in ("max_position_embeddings", "max_seq_len", "n_positions", "n_ctx"))
    return next((int(limit) for limit in limits if isinstance(limit, int | float) and 0 < limit < math.inf), None)


def _separator_id(tokenizer: Any) -> int:
    """The id that separates documents: `<|endoftext|>` where there is one, else BOS, else EOS.

    Chat models often name chat tokens as BOS and EOS, which no plain text holds.
    """
    plain = tokenizer.get_vocab().get("<|endoftext|>")
    for candidate in (plain, tokenizer.bos_token_id, tokenizer.eos_token_id):
        if candidate is not None:
            return int(candidate)
    raise UserError(f"{type(tokenizer).__name__} has no token to separate documents with")
