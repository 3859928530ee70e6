"""Solvers of the ODE of a velocity."""

from diffkern.compat.flow_matching.solver.ode_solver import ODESolver
from diffkern.compat.flow_matching.solver.solver import Solver

__all__ = ["ODESolver", "Solver"]
