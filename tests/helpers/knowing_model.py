"""A model that knows things: a small Llama trained to answer multiple-choice questions under every order of choices.

Its weights lie in `fixtures/knowing_model` (`python -m tests.knowing_model` trains them anew, in half a minute), so that
what SAE Bench says of it can be a fixture.
"""

from __future__ import annotations

import json
import sys
from itertools import permutations
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sae_research.evals.unlearning.prompts import question_text
from sae_research.lm import LanguageModel
from sae_research.saes import SAEConfig, SparseAutoencoder
from sae_research.saes.forms import StandardSAE, TopKSAE
from sae_research.saes.pursuit.encoders import IHTPSAE, MPSAE
from sae_research.text.questions import Question

FOLDER = Path(__file__).parents[1] / "fixtures" / "knowing_model"
HOOK = "blocks.0.hook_resid_post"
SPECIAL = ("<|endoftext|>", "<eos>", "<pad>", "<unk>")
CHAT_TEMPLATE = "<|endoftext|>user {{ messages[0]['content'] }} model "
STOCK_FORMAT = "<|endoftext|>user {prompt} model "
"""The same in the form of SAE Bench's GEMMA_INST_FORMAT."""

FILLER = "table chair window bottle carpet pencil ladder basket hammer mirror".split()
BIOLOGY = {
    "carries oxygen": "blood",
    "reads genes": "ribosome",
    "pumps blood": "heart",
    "stores genes": "dna",
    "digests food": "stomach",
    "filters blood": "kidney",
    "fights germs": "antibody",
    "splits sugar": "enzyme",
}
GEOGRAPHY = {
    "is tall": "mountain",
    "is wet": "ocean",
    "is dry": "desert",
    "is frozen": "glacier",
    "flows down": "river",
    "is hot": "volcano",
    "is green": "forest",
    "is round": "globe",
}
SUBJECTS = {"wmdp-bio": ("biology", BIOLOGY), "human_geography": ("human geography", GEOGRAPHY)}


def rows(name: str) -> list[dict[str, object]]:
    """The questions of a set, in the layout of WMDP and MMLU.

    Biology's wrong choices are geography's answers, geography's are other things: a model that has lost biology's answers
    errs on biology alone, and none is known by elimination.
    """
    wrong = list(GEOGRAPHY.values()) if name == "wmdp-bio" else FILLER
    result = []
    for number, (fact, right) in enumerate(SUBJECTS[name][1].items()):
        choices = [wrong[(number + step) % len(wrong)] for step in (0, 3, 5)]
        choices.insert(number % 4, right)
        result.append({"question": f"what {fact} ?", "choices": choices, "answer": number % 4})
    return result


def corpus(name: str, n: int = 120) -> list[str]:
    """Sentences about what a set asks, each distinct."""
    facts = list(SUBJECTS[name][1].items())
    return [
        " ".join(f"{right} {fact} ." for fact, right in (facts[(i * j + i + j) % 8] for j in range(1, 9)))
        + f" {FILLER[i % 10]} {FILLER[i // 10 % 10]} {'.' * (1 + i // 100)}"
        for i in range(n)
    ]


def prompts(name: str) -> dict[str, str]:
    """Prompt -> letter, for every question of a set under every order of its choices."""
    result = {}
    for row in rows(name):
        question = Question(str(row["question"]), tuple(row["choices"]), int(row["answer"]))  # type: ignore[arg-type]
        for order in permutations(range(4)):
            text = STOCK_FORMAT.format(prompt=question_text(question, order, SUBJECTS[name][0])) + "Answer: ("
            result[text] = "ABCD"[order.index(question.answer)]
    return result


def write_data(folder: Path) -> None:
    """`<set>.jsonl` with questions and `<set>-corpus.jsonl` with text, for both sets."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in SUBJECTS:
        _write_lines(folder / f"{name}.jsonl", rows(name))
        _write_lines(folder / f"{name}-corpus.jsonl", [{"text": text} for text in corpus(name)])


def _write_lines(path: Path, values: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))


# --- SAEs ------------------------------------------------------------------------------------


def make_saes(lm: LanguageModel, hook: str = HOOK) -> dict[str, SparseAutoencoder]:
    """One SAE per inference form over a dictionary with an atom for each right answer: the mean activation of its tokens.

    The encoder is the least-squares read-out of which of them stands at a token, all other words being zero; its bias
    keeps it silent below 0.6 of a full answer.
    """
    texts = [text for name in SUBJECTS for text in (*prompts(name), *corpus(name))]
    tokens = [torch.tensor(lm.tokenizer(text)["input_ids"]) for text in texts]
    ids = torch.cat([row[1:] for row in tokens])
    x = torch.cat([lm.activations(row[None], hook)[0, 1:] for row in tokens])
    words = [right for _, facts in SUBJECTS.values() for right in facts.values()]
    is_word = (ids[:, None] == torch.tensor(lm.tokenizer.convert_tokens_to_ids(words))).float()
    b_dec = x.mean(0)
    weight = torch.where(is_word.any(dim=1), 30.0, 1.0).sqrt()[:, None]  # they are rare
    W_enc = 10 * torch.linalg.lstsq((x - b_dec) * weight, is_word * weight).solution
    W_dec = torch.nn.functional.normalize((is_word.T @ (x - b_dec)) / is_word.sum(0)[:, None], dim=1)
    d_sae = len(words)

    def config(form: str, **options: int) -> SAEConfig:
        return SAEConfig(form=form, d_in=lm.d_model, d_sae=d_sae, model_name=lm.name, hook_name=hook, options=options)

    tensors = {"W_enc": W_enc, "b_enc": torch.full((d_sae,), -6.0), "W_dec": W_dec, "b_dec": b_dec}
    return {
        "standard": StandardSAE(config("standard"), **tensors),
        "topk": TopKSAE(config("topk", k=3), k=3, **tensors),
        "mpsae": MPSAE(W_dec, b_dec, 4, config("matching_pursuit", s=4)),
        "ihtp": IHTPSAE(W_dec, b_dec, 1, config("ihtp", k=1)),
    }


# --- training --------------------------------------------------------------------------------


def train(folder: Path, d_model: int = 32, steps: int = 3000, seed: int = 0) -> None:
    """Train until every question is answered under all 24 orders, with a margin, and save.

    The corpora are learnt beside the questions: they tell one answer from another.
    """
    tokenizer = _tokenizer()
    asked = {text: answer for name in SUBJECTS for text, answer in prompts(name).items()}
    tokens = [torch.tensor(tokenizer(text)["input_ids"]) for text in asked]
    last = torch.tensor([len(row) - 1 for row in tokens])
    tokens = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True, padding_value=tokenizer.pad_token_id)
    target = torch.tensor(tokenizer.convert_tokens_to_ids(list(asked.values())))
    running = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(tokenizer(f"<|endoftext|> {text}")["input_ids"]) for name in SUBJECTS for text in corpus(name)],
        batch_first=True,
        padding_value=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=d_model,
            intermediate_size=2 * d_model,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            vocab_size=len(tokenizer),
            max_position_embeddings=128,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.01)
    for step in range(steps):
        rate = min(1.0, step / 50)
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * rate
        batch = torch.randint(len(tokens), (96,))
        hidden = model.model(tokens[batch]).last_hidden_state[torch.arange(96), last[batch]]
        logits = model.lm_head(hidden)
        texts = running[torch.randint(len(running), (32,))]
        loss = (
            torch.nn.functional.cross_entropy(logits, target[batch])
            + model(input_ids=texts, labels=texts.where(texts != tokenizer.pad_token_id, -100)).loss
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 49:
            with torch.no_grad():
                every = model.lm_head(model.model(tokens).last_hidden_state[torch.arange(len(tokens)), last])
            margin = every.gather(1, target[:, None])[:, 0] - every.scatter(1, target[:, None], -1e9).max(dim=1).values
            print(f"step {step + 1}: {(margin > 0).float().mean():.3f} right, least margin {margin.min():.2f}")
            if margin.min() > 2:
                break
    else:
        raise RuntimeError("the model did not learn every question")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _tokenizer() -> PreTrainedTokenizerFast:
    splitter = pre_tokenizers.Whitespace()
    prompts = " ".join(
        [
            "The following are multiple choice questions (with answers) about biology. human geography",
            "user model Answer: ( A B C D . .. ?",
            *FILLER,
        ]
    )
    facts = [(fact, right) for _, known in SUBJECTS.values() for fact, right in known.items()]
    words = prompts + " " + " ".join(f"what {fact} {right}" for fact, right in facts)
    vocabulary = dict.fromkeys([*SPECIAL, *(word for word, _ in splitter.pre_tokenize_str(words))])
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = splitter
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        chat_template=CHAT_TEMPLATE,
    )


if __name__ == "__main__":
    train(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
