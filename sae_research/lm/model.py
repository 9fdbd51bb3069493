"""The language model under study: activations at a hook, logits, and logits from edited activations."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from sae_research.errors import UserError
from sae_research.lm.hooks import HookPoint, find_layers, locate
from sae_research.lm.products import use_onednn


class _Stop(Exception):
    """Raised inside a hook once its activations are taken: later layers must not run."""


class _StandIn(nn.Module):
    """Takes the place of a layer: returns its input, or given activations, in the layer's own return shape."""

    def __init__(self, layer: nn.Module, returns_tuple: bool, activations: Tensor | None = None) -> None:
        super().__init__()
        self.__dict__["layer"] = layer  # not registered: its attributes are read, it never runs
        self.returns_tuple = returns_tuple
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
        return (out,) if self.returns_tuple else out


class LanguageModel:
    """A Hugging Face decoder behind TransformerLens hook names. Everything runs without gradients, but that `resume`
    lets them through to the activations it is given.

    tokens are [batch, seq] ids, padded on the right where at all: attention is causal, so padding changes no
    real token.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, name: str, fingerprint: str) -> None:
        self.model = model.eval().requires_grad_(False)
        use_onednn(model)
        self.tokenizer = tokenizer
        self.name = name
        self.fingerprint = fingerprint
        config = model.config.get_text_config()
        self.d_model: int = config.hidden_size
        self.n_layers: int = config.num_hidden_layers
        self.vocab_size: int = model.get_input_embeddings().weight.shape[0]
        self.layers = find_layers(model, self.n_layers)
        self.separator_id = _separator_id(tokenizer)
        self._returns_tuple, self.can_resume = False, True
        self._keeps_positions = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._check_resume()

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

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
        point = locate(self.layers, hook)
        if point.kind == "attn.hook_z":
            weight = point.module.weight
            return weight.shape[0] if type(point.module).__name__ == "Conv1D" else weight.shape[1]
        return self.d_model

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

        with self._edit(locate(self.layers, hook), take):
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
                return value
            return take

        with ExitStack() as edits:
            for hook in dict.fromkeys(hooks):
                edits.enter_context(self._edit(locate(self.layers, hook), taker(hook)))
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

    def edited_logits(self, tokens: Tensor, edits: Mapping[str, Callable[[Tensor], Tensor]],
                      positions: Tensor | None = None, past: Any = None) -> Tensor:
        """Logits [batch, seq, vocab] (or of `positions` [n] only) of a run in which the activations at each hook
        [batch, seq, d_in] pass through its edit. Every edit is checked to have happened once.

        Gradients flow back to what an edit returns, where that requires them. past: a `transformers` cache of what
        comes before `tokens`; this run adds to it.
        """
        with ExitStack() as stack:
            for hook, edit in edits.items():
                stack.enter_context(self._counted_edit(hook, edit))
            return self._forward(tokens, past, positions)

    def resume(self, hook: str, activations: Tensor, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """Logits [batch, seq, vocab] as if the model had computed `activations` [batch, seq, d_in] at `hook`.

        `positions` [n]: only their logits are wanted [batch, n, vocab]. Gradients reach `activations` where those
        require them. At residual hooks the layers before do not run; elsewhere, and for architectures whose check at
        load failed, this is a full run with the activations patched in.
        """
        point = locate(self.layers, hook)
        last = point.layer - 1 if point.kind == "hook_resid_pre" else point.layer
        with torch.set_grad_enabled(torch.is_grad_enabled() and activations.requires_grad):
            if not self.can_resume or last < 0 or not point.kind.startswith("hook_resid"):
                with self._counted_edit(hook, lambda _: activations):
                    return self._forward(tokens, positions=positions)
            with self._stand_ins(last, activations.to(self.dtype)) as final:
                logits = self._forward(tokens, positions=positions)
        if final.calls != 1:
            raise UserError(f"resuming at {hook}: layer {last} ran {final.calls} times, expected once")
        return logits

    @torch.no_grad()
    def generate(self, tokens: Tensor, n_tokens: int, hook: str | None = None,
                 edit: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Greedy continuation [batch, n_tokens] of prompts of one length [batch, seq], without padding.

        `edit` replaces the prompt's activations at `hook` [batch, seq, d_in]; generated tokens' stay the model's own.
        What follows an end-of-text token means nothing: the caller cuts there.
        """
        with nullcontext() if hook is None or edit is None else self._counted_edit(hook, edit):
            last = {"logits_to_keep": 1} if self._keeps_positions else {}
            out = self.model(input_ids=tokens.to(self.device), use_cache=True, **last)
        ids = [out.logits[:, -1].argmax(-1)]
        while len(ids) < n_tokens:
            out = self.model(input_ids=ids[-1][:, None], past_key_values=out.past_key_values, use_cache=True)
            ids.append(out.logits[:, -1].argmax(-1))
        return torch.stack(ids, dim=1)

    # --- how ---

    def _forward(self, tokens: Tensor, past: Any = None, positions: Tensor | None = None) -> Tensor:
        """Logits [batch, seq, vocab], or those of `positions` [batch, n, vocab]; `past` is added to."""
        options: dict[str, Any] = {"use_cache": False} if past is None else {"use_cache": True, "past_key_values": past}
        if positions is not None:
            positions = positions.to(self.device)
            if self._keeps_positions:
                options["logits_to_keep"] = positions
        logits = self.model(input_ids=tokens.to(self.device), **options).logits
        return logits if positions is None or self._keeps_positions else logits[:, positions]

    @contextmanager
    def _counted_edit(self, hook: str, edit: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """`_edit`, checked to have happened exactly once."""
        calls = 0

        def counted(value: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            return edit(value).to(value.dtype)

        with self._edit(locate(self.layers, hook), counted):
            yield
        if calls != 1:
            raise UserError(f"hook {hook} fired {calls} times in one pass of {type(self.model).__name__}, expected 1")

    @contextmanager
    def _edit(self, point: HookPoint, edit: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Pass one module's input or output through `edit`, whatever the family's return shape."""

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            if args:
                return (edit(args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": edit(kwargs["hidden_states"])}

        def after(_: nn.Module, __: Any, output: Any) -> Any:
            return (edit(output[0]), *output[1:]) if isinstance(output, tuple) else edit(output)

        handle = (point.module.register_forward_pre_hook(before, with_kwargs=True) if point.before
                  else point.module.register_forward_hook(after))
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def _stand_ins(self, last: int, activations: Tensor) -> Iterator[_StandIn]:
        """Layers 0 to `last` do nothing but the last, which answers with `activations`.

        The model itself runs as ever, so masks, positions and embeddings stay its own.
        """
        originals = [self.layers[i] for i in range(last + 1)]
        final = _StandIn(originals[-1], self._returns_tuple, activations)
        try:
            for i, layer in enumerate(originals):
                self.layers[i] = final if i == last else _StandIn(layer, self._returns_tuple)
            yield final
        finally:
            for i, layer in enumerate(originals):
                self.layers[i] = layer

    def _check_resume(self) -> None:
        """Compare resuming with a full run on a few tokens; where they differ, always run in full."""
        tokens = (torch.arange(8, device=self.device) * 7 % self.vocab_size)[None]
        middle = self.n_layers // 2
        seen: list[bool] = []
        handle = self.layers[middle].register_forward_hook(lambda _, __, out: seen.append(isinstance(out, tuple)))
        with torch.no_grad():
            full = self._forward(tokens)
        handle.remove()
        if not seen:
            raise UserError(f"{self.name}: layer {middle} never ran; this architecture is not supported")
        self._returns_tuple = seen[0]
        hook = f"blocks.{middle}.hook_resid_post"
        activations = self.activations(tokens, hook)
        self.can_resume = activations.shape[-1] == self.d_model and activations.dim() == 3
        if self.can_resume:
            resumed = self.resume(hook, activations, tokens)
            self.can_resume = torch.allclose(resumed.float(), full.float(), atol=1e-4, rtol=1e-4)


def _separator_id(tokenizer: Any) -> int:
    """The id that separates documents: `<|endoftext|>` where there is one, else BOS, else EOS.

    Chat models often name chat tokens as BOS and EOS, which no plain text holds.
    """
    plain = tokenizer.get_vocab().get("<|endoftext|>")
    for candidate in (plain, tokenizer.bos_token_id, tokenizer.eos_token_id):
        if candidate is not None:
            return int(candidate)
    raise UserError(f"{type(tokenizer).__name__} has no token to separate documents with")
