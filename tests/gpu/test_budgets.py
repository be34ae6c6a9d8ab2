"""Allocator peaks against budgets and predictions, and gradients, through both doors."""

from __future__ import annotations

import torch

import remat
from remat.backend import remat_backend  # by name it is known where remat is installed
from tests.gpu.case import Case, peak_of, plan_of, run_step, small

POLICIES = ("blocks", "every-2", "sqrt", "selective", "offload", "offload-all")


class Door1(Case):
    def test_budgets_hold_and_are_predicted(self) -> None:
        model, x = small()
        expected = run_step(remat.optimize(model, (x,), budget=None), model, x)
        for budget in (0.8, 0.6, 0.4):
            for host_budget in (0, "8GiB"):
                with self.subTest(budget=budget, host_budget=host_budget):
                    module = remat.optimize(model, (x,), budget=budget, host_budget=host_budget)
                    self.assert_same(run_step(module, model, x), expected)
                    peak, plan = peak_of(module, model, x), plan_of(module)
                    self.assertLessEqual(peak, plan.budget_bytes)
                    self.assertLessEqual(abs(plan.peak_bytes / peak - 1), 0.03)

    def test_policies_change_nothing_and_are_predicted(self) -> None:
        model, x = small()
        unconstrained = remat.optimize(model, (x,), budget=None)
        expected, most = run_step(unconstrained, model, x), peak_of(unconstrained, model, x)
        for policy in POLICIES:
            with self.subTest(policy=policy):
                module = remat.optimize(model, (x,), budget=None, policy=policy)
                self.assert_same(run_step(module, model, x), expected)
                peak, plan = peak_of(module, model, x), plan_of(module)
                self.assertLess(peak, most)
                self.assertLessEqual(abs(plan.peak_bytes / peak - 1), 0.03)

    def test_bfloat16_and_autocast(self) -> None:
        model, x = small(dtype=torch.bfloat16)
        expected = run_step(remat.optimize(model, (x,), budget=None), model, x)
        self.assert_same(run_step(remat.optimize(model, (x,), budget=0.5), model, x), expected)
        model, x = small()
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            expected = run_step(remat.optimize(model, (x,), budget=None), model, x)
            self.assert_same(run_step(remat.optimize(model, (x,), budget=0.5), model, x), expected)

    def test_close_to_the_original(self) -> None:
        model, x = small(dropout=0.0)
        self.assert_close(run_step(remat.optimize(model, (x,), budget=0.5), model, x), run_step(model, model, x), 1e-4)


class Door2(Case):
    def _steps(self, compiler: str, tolerance: float) -> None:
        model, x = small(dropout=0.0)

        def through(**options: object) -> tuple[object, remat.Plan, list[torch.Tensor], int]:
            torch.compiler.reset()
            compiled = torch.compile(model, backend=remat_backend, options={"compiler": compiler, **options})
            found = run_step(compiled, model, x)
            return compiled, remat.plans(compiled)[0].plan, found, peak_of(compiled, model, x)

        _, everything, expected, most = through()
        for options in ({"budget": 0.7}, {"budget": 0.5, "host_budget": "8GiB"}, {"policy": "offload"}):
            with self.subTest(compiler=compiler, **options):
                _, plan, found, peak = through(**options)
                self.assert_close(found, expected, tolerance)
                self.assertLess(peak, most)
                self.assertLessEqual(peak, plan.budget_bytes or everything.peak_bytes)
                self.assertLessEqual(abs(plan.peak_bytes / peak - 1), 0.05)

    def test_eager(self) -> None:
        self._steps("eager", 0.0)

    def test_inductor(self) -> None:
        if self.device.type != "cuda":
            self.skipTest("Inductor has no code for this device here")
        self._steps("inductor", 1e-4)
