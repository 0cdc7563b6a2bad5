# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint can do: held-out scores, agreement with Hugging Face's model, and a question asked by hand."""
