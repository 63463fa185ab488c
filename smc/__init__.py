"""SpectralMC: neural Monte Carlo pricers, trained on payoff spectra, kept in a ledger.

Read in this order: contracts are drawn (`contracts`, `sobol_sampler`), paths simulated (`gbm`), payoffs
become a spectrum (`spectrum`), a network learns it (`cvnn`, `scaling`, `gbm_trainer`), and a snapshot of
it (`checkpoint`) is committed beside training (`commits`) as an entry of the ledger (`storage`).
"""
