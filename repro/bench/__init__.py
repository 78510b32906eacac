"""Benchmarks: experiments of a group of their own (`bench=<name>`), whose results are times of this machine and asserted by no test."""
