"""Hankel singular values and what is made of them: Gramians, spectra, truncations, projections and fits.

How a state is cut:

1. A layer reads tokens into a state, h_t = Ā_t h_{t-1} + Δ_t B_t u_t, and reads it out again, y_t = C_t · h_t. The state has N
   numbers per channel; N is what gets smaller.
2. On a few thousand tokens, a scan forward gives the controllability Gramian P (how much the input moves each state), a
   scan backward the observability Gramian Q (how much each state moves the output). Both follow the Ā_t, B_t and C_t of the
   actual tokens: the system varies in time.
3. The Hankel singular values are the square roots of the eigenvalues of PQ. They don't depend on the coordinates of the
   state, and for a system that does not vary in time, twice the sum of those cut bounds the error.
4. `max_divergence=0.01` cuts each layer alone, at two sizes, to see what it costs the predictions, shares the states by that, and tries the plan on
   held-out tokens until it fits. `tolerance=0.05` keeps as many states of each layer as hold 95% of the sum.
5. Which states stay matters more than how many. **Mamba**: greedy elimination on the contributions to the output; then the
   read-out C, and A, B and D, are refitted so that the small layer says what the large one said. All of it folds into the
   stock weights.
6. **Mamba-2**: all states of a head decay alike, so any change of basis commutes with the recurrence. The state is projected
   by a balanced truncation: two small matrices per layer, after the convolution. Or per head: each has a Gramian of its own, and
   the states that carry most stay, whichever head they belong to. A stock checkpoint keeps some of the states
   instead, whose rows of B and C, before convolution and SiLU, are fitted by L-BFGS: first as if the read-outs were independent
   of the states, as the projection does, which costs no scan and is not learnt by heart; then to the layer's output. Held-out
   sequences say when to stop, and that it is no worse than before.
7. While training, states are dropped, together with their rows of the optimizer's state, and training does the rest; with
   `refit=3`, the layers are fitted at each cut as well.

Source: Chahine et al., The Curious Case of In-Training Compression of State Space Models (arXiv 2510.02823).
"""
