# SPDX-License-Identifier: Apache-2.0
"""Launching on SLURM: a job as an sbatch file, what happens when it ends, and the first error of many logs."""
