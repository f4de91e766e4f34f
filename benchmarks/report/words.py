"""What each script asks, and what was measured, in words."""

from typing import NamedTuple


class Words(NamedTuple):
    """A question, how it was measured, and what the plot shows if there is one of the script's name."""

    question: str
    measured: str
    plot: str = ""


WORDS = {
    "overwrite_vs_fuse": Words(
        "How long does it take to change 1 % of one weight, against fusing a LoRA into it?",
        """A square weight of random values, as in the paper's Figure 5. A switch is `Resident.set`, from the base to
        an adapter in memory, with its checks and the bits that it keeps; the write alone is the kernel, given
        values that are ready. LoRA of rank 64 and PEFT's SHiRA of as many entries are merged by PEFT's own layers.""",
        "Time to change one float32 weight, over its size. Both axes are logarithmic.",
    ),
    "switch": Words(
        "How long does it take to get from one adapter to another?",
        """Two adapters for attention and feed-forward of a UNet with random weights, activated in turns: `set_shira`
        with both in memory, and `load_shira` from a file until it is active. Against diffusers' LoRA of rank 64,
        fused (unfuse, unload, load, fuse) or beside the weights, where it slows down every step, and PEFT's SHiRA.
        The limit of memory is the time in which a copy would move the bytes that a switch must touch.""",
        "From one adapter to another, by method. The axis is logarithmic.",
    ),
    "fuse": Words(
        "What does a mix of several adapters cost, and moving one of its sliders?",
        """Adapters of 1 % at random for attention and feed-forward. The first use of a mix plans it, later ones do
        not; a moved slider writes the mix's entries with another strength. For LoRAs of rank 64 a moved slider is
        `unfuse_lora`, `set_adapters`, `fuse_lora`.""",
        "A slider of a mix moved, over the number of adapters in it. Both axes are logarithmic.",
    ),
    "inference": Words(
        "Does a UNet call take longer after a switch, and does `torch.compile` have to start again?",
        """Calls of the adapted UNet and of the base alternate at batch 1, so that both meet the same moods of the
        machine; the ratio is the median of the pairs'. Then a UNet is compiled in place and called after each of
        many moves to another adapter or strength: what was compiled or captured anew is counted, and each result is
        compared with what the same UNet computes without its compiled code. A stale graph would be off by as much
        as a move changes.""",
    ),
    "load_many": Words(
        "Does the 200th adapter cost more than the first?",
        """One adapter after another is loaded from a file in the page cache and none made active: by `load_shira`, by
        `AdapterLibrary`, which keeps files as they are and two of them decoded, and by diffusers' `load_lora_weights`.
        Memory is what each adapter added to the process, and to the GPU's tensors. LoRAs have rank 16, a quarter of the
        usual, so that many fit.""",
        "Time to load an adapter, over how many there are already. Both axes are logarithmic.",
    ),
    "cold_start": Words(
        "How long does it take from a file to an active adapter?",
        """Each part by itself, and the whole: `load_shira`, and `AdapterLibrary.set` of an adapter of which nothing,
        its file's bytes, or the decoded entries are in memory. Decoding and copying overlap. The file is in the page
        cache but where it says disk. Weights are checked after each.""",
    ),
    "size": Words(
        "How many bytes does an entry take on disk?",
        """Files of adapters with float16 values for attention and feed-forward, really written. The bound is the least
        that any format needs: the value, and the bits that tell one mask of the family from all others. `struct`
        masks are told by their first line, so the value alone is their bound, but files list their entries like any
        others. PEFT writes float32 values with two indices each. A LoRA of rank 64 has no entries: its float16 file
        is for the same layers.""",
    ),
    "drift": Words(
        "Is the base the same after many switches?",
        """The share of all entries of attention and feed-forward whose bits differ from the base's, after so many
        switches and a removal. diffusers' `unfuse_lora` subtracts what `fuse_lora` added, and both round.""",
        "Entries whose bits differ from the base's, over switches. SHiRA's stay at zero in all types.",
    ),
    "training": Words(
        "What does a training step cost?",
        """Attention and feed-forward at 1 %, bfloat16 weights of random values, AdamW, all methods in one run.
        "Frozen" is the floor: forward and backward without any trained weight. "Recompute" is `--recompute_inputs`.""",
    ),
    "demo": Words(
        "How fast and how clean is switching on the bundled demo model?",
        """All bundled adapters are loaded, then random mixes of one to all of them at random strengths are activated,
        and at the end every parameter's bits are compared. A picture has 20 steps with guidance.""",
    ),
    "app_memory": Words(
        "Does the app's memory grow with the pictures it draws?",
        """Pictures with changing mixes on the demo model, drawn the way the app draws them: checked, in turn, switched,
        kept in the history; every tenth a rough preview, every seventh stopped amid.""",
    ),
}
