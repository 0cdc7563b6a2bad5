# SPDX-License-Identifier: Apache-2.0
"""The vision-language model: encoder, connector, language model, and the layer specs that join them to Megatron."""
