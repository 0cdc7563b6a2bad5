# SPDX-License-Identifier: Apache-2.0
"""Makes a parser of all flags when it is imported, so that forked programs have the help that it reads (`forked`).

It is imported last, and takes what was imported out of garbage collection: a fork that collects would copy all of it.
"""

import gc

from megatron_smar.config.run_file import flag_parser

flag_parser()
gc.collect()
gc.freeze()
