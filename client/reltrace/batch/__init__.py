"""Files of prompts in, folders of traces out: `reltrace batch` and `load_batch`."""
