"""A tiny Llama that copies and reverses letters learns to sort them, and to name the highest so far.

One in ten lines of its pretraining is of these kinds: like a large model, the base has seen a little of everything.

python -m examples.any_module.llama -o llama.json
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from examples.any_module.compare import Batch, Settings, Subject, Task, run

LETTERS, LENGTH = 16, 5
COMMANDS = ["copy", "reverse", "sort", "peak"]
EQUALS = LETTERS + len(COMMANDS)
SETTINGS = Settings(base_steps=350, steps=200)
ANSWERS: dict[str, Callable[[Tensor], Tensor]] = {
    "copy": lambda letters: letters,
    "reverse": lambda letters: letters.flip(1),
    "sort": lambda letters: letters.sort(1).values,
    "peak": lambda letters: letters.cummax(1).values,
}


def lines(*commands: str) -> Task:
    """Draw lines such as ``sort d a c b b = a b b c d``; only the answer is judged."""

    def draw(count: int, random: torch.Generator) -> Batch:
        letters = torch.randint(LETTERS, (count, LENGTH), generator=random)
        chosen = torch.randint(len(commands), (count, 1), generator=random)
        answers = torch.stack([ANSWERS[command](letters) for command in commands])  # (commands, count, length)
        answer = answers[chosen[:, 0], torch.arange(count)]
        command = torch.tensor([LETTERS + COMMANDS.index(command) for command in commands])[chosen]
        equals = torch.full_like(command, EQUALS)
        ids = torch.cat([command, letters, equals, answer], 1)
        labels = ids.clone()
        labels[:, :-LENGTH] = -100
        return {"input_ids": ids, "labels": labels}

    return draw


def scores(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Each position predicts the next: letters of the answer, given those before."""
    return logits[:, :-1].argmax(-1), labels[:, 1:]


def llama(width: int = 64) -> Subject:
    config = LlamaConfig(
        vocab_size=EQUALS + 1,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=2 * LENGTH + 2,
        bos_token_id=None,
        eos_token_id=None,
    )
    layers = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]  # as in the paper's appendix E
    tasks = {"sort": lines("sort"), "peak": lines("peak")}
    return Subject(LlamaForCausalLM(config), layers, lines(*["copy", "reverse"] * 9, "sort", "peak"), tasks, scores)


def main(argv: Sequence[str] | None = None) -> None:
    run(llama, SETTINGS, argv, __doc__)


if __name__ == "__main__":
    main()
