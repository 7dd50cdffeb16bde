"""The golden bundles of InternVL-Chat-V1-2 and InternVL 2, 2.5 and 3.5."""

from support.golden import DATA, bundle

BUNDLES = ("internvl_chat_v1_2", "internvl2_internlm2", "internvl2_5_qwen2", "internvl3_5_qwen3")


class Bundle:
    """A bundle's directory, arrays, facts and prompts."""

    def __init__(self, name):
        self.root = DATA / name
        self.directory = self.root / "checkpoint"
        self.arrays, self.facts = bundle(name)
        self.prompts = {prompt["id"]: prompt for prompt in self.facts["prompts"]}

    def image(self, name):
        return self.root / self.facts["images"][name]["file"]

    def asked(self, prompt):
        """question, images, history of a prompt, and the options that its answer was recorded with."""
        history = [tuple(turn) for turn in prompt["history"] or ()]
        options = {
            "honor_exif": False,
            "combine": prompt["num_patches_list"] is None,
            "system": prompt["system_message"],
        }
        if self.facts["config"]["dynamic_image_size"]:
            options["max_tiles"] = prompt["max_num"]
        return prompt["question"], [self.image(name) for name in prompt["images"]], history, options
