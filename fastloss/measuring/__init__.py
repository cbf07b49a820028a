"""The instruments of ``demo``, ``bench`` and ``benchmarks/``.

- :mod:`.contenders`: one adapter for each package that is compared;
- :mod:`.inputs`: random tensors to measure with;
- :mod:`.reference`, :mod:`.sgd`: the check of a result against float64;
- :mod:`.clock`: times in turns, on a CPU and on a GPU; the copy, and the products of matrices, that are the limits;
- :mod:`.info`: the versions, and the backend that serves this machine: ``python -m fastloss info``;
- :mod:`.machine`: memory, other programs' share of the CPUs, and the machine in words;
- :mod:`.style`: the style of tables and pictures.
"""
