"""What the files around the weights say: config.json, generation_config.json and the tokenizer's.

Strangers wrote them. They are read with limits, and what is wrong with one is said in one line that names its field.
"""
