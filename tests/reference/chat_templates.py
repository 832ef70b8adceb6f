"""Chat templates that treat messages in the ways that real ones do."""

CHATML = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a cat<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""As SmolLM2's: contents as they are, and a system message where there is none."""

STRICT = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}"
    "{% set first = messages[0].content | trim %}{% set messages = messages[1:] %}{% endif %}"
    "{% for message in messages %}{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "[{{ message.role }}] {% if loop.first and first %}{{ first }} / {% endif %}"
    "{{ message.content | trim }} {% endfor %}[assistant]"
)
"""As those of Llama 2 and Gemma: a BOS, contents trimmed, the system message in the first turn."""

REASONING = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if '</think>' in message.content %}{{ message.content.split('</think>')[-1].lstrip('\n') }}"
    "{% elif message.content.startswith('/') %}(command) {{ message.content }}"
    "{% else %}{{ message.content }}{% endif %}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)
"""As Qwen 3's: what it leaves out depends on what a message says."""
