"""The samplers once more, each as its source prints it, in float64 on arrays: what the tables are held against.

A loop is given a `Run`; it keeps its own latent, with noise level `ratio` (k-diffusion's sigma) or alpha and sigma.
"""

import math

import numpy as np
from scipy.integrate import quad


class Run:
    """A network behind the three ways in which papers call it, and each call's noise.

    levels: (t, alpha, sigma) of the calls and the end.  start: variance-preserving.  noises: [R, ...], one a call.
    """

    def __init__(self, network, schedule, levels, start, noises, **options):
        self.network, self.schedule, self.levels, self.start, self.noises = network, schedule, levels, start, noises
        self.options, self.calls = options, 0

    @property
    def ratios(self):
        return [level.sigma / level.alpha for level in self.levels]

    def output(self, x, t):
        self.calls += 1
        return self.network(x, t)

    def image_and_noise(self, x, t, alpha, sigma):
        """Both predictions at a variance-preserving x."""
        out, kind = self.output(x, t), self.schedule.prediction_type
        if kind == "epsilon":
            return (x - sigma * out) / alpha, out
        if kind == "v_prediction":
            return alpha * x - sigma * out, alpha * out + sigma * x
        return out, (x - alpha * out) / sigma

    def denoised(self, x, ratio, t):
        """k-diffusion's model(x, sigma)."""
        alpha = 1 / math.sqrt(1 + ratio**2)
        return self.image_and_noise(x * alpha, t, alpha, ratio * alpha)[0]

    def t_of(self, ratio):
        return float(self.schedule.timestep_of(ratio))

    def noise(self):
        """The noise after the latest call."""
        return self.noises[self.calls - 1]

    def abar(self, t):
        return self.schedule.alphas_cumprod[int(t)]


def pairs(run):
    """(t, ratio, next ratio) of each step."""
    return zip((level.t for level in run.levels), run.ratios, run.ratios[1:], strict=False)


def ancestral_step(here, there):
    """k-diffusion's get_ancestral_step at eta 1."""
    up = min(there, math.sqrt(there**2 * (here**2 - there**2) / here**2))
    return math.sqrt(there**2 - up**2), up


def ddim(run):
    """DDIM, eq. 12 and 16."""
    x, eta, n = run.start, run.options["eta"], len(run.levels) - 1
    for level in run.levels[:-1]:
        image, eps = run.image_and_noise(x, level.t, level.alpha, level.sigma)
        before = level.t - 1000 // n
        a, b = run.abar(level.t), run.abar(max(before, 0))  # set_alpha_to_one is false in the tests' config
        spread = eta * math.sqrt((1 - b) / (1 - a)) * math.sqrt(max(1 - a / b, 0))
        x = math.sqrt(b) * image + math.sqrt(1 - b - spread**2) * eps + spread * run.noise()
    return x


def ddpm(run):
    """DDPM, eq. 7: the posterior's mean and (small) variance."""
    x = run.start
    for i, level in enumerate(run.levels[:-1]):
        a = run.abar(level.t)
        b = run.abar(run.levels[i + 1].t) if i + 2 < len(run.levels) else 1.0
        beta = 1 - a / b
        image, _ = run.image_and_noise(x, level.t, level.alpha, level.sigma)
        mean = math.sqrt(b) * beta / (1 - a) * image + math.sqrt(a / b) * (1 - b) / (1 - a) * x
        x = mean + math.sqrt((1 - b) / (1 - a) * beta) * run.noise()
    return x


def plms(run):
    """PNDM, eq. 11 (the transfer) and 12 (linear multistep); its first step by Heun's method, as CompVis has it."""
    ts = [int(level.t) for level in run.levels[:-1]]
    stride, kind = 1000 // len(ts), run.schedule.prediction_type

    def transfer(x, out, t, before):
        a, b = run.abar(t), run.abar(max(before, 0))
        if kind == "v_prediction":
            out = math.sqrt(a) * out + math.sqrt(1 - a) * x
        if kind == "sample":
            out = (x - math.sqrt(a) * out) / math.sqrt(1 - a)
        shrink = (b - a) / (math.sqrt(a) * (math.sqrt((1 - b) * a) + math.sqrt((1 - a) * b)))
        return math.sqrt(b / a) * x - shrink * out

    x, e = run.start, [run.output(run.start, ts[0])]
    guess = transfer(x, e[0], ts[0], ts[0] - stride)
    if len(ts) == 1:
        return guess
    x = transfer(x, (e[0] + run.output(guess, ts[1])) / 2, ts[1] + stride, ts[1])
    for t in ts[1:]:
        e = [run.output(x, t), *e]
        if len(e) == 2:
            mean = (3 * e[0] - e[1]) / 2
        elif len(e) == 3:
            mean = (23 * e[0] - 16 * e[1] + 5 * e[2]) / 12
        else:
            mean = (55 * e[0] - 59 * e[1] + 37 * e[2] - 9 * e[3]) / 24
        x = transfer(x, mean, t, t - stride)
    return x


def lagrange(nodes, i, at):
    return math.prod((at - other) / (nodes[i] - other) for j, other in enumerate(nodes) if j != i)


def lms(run):
    """k-diffusion's sample_lms: each slope's Lagrange polynomial integrated over sigma."""
    x, slopes, nodes = run.start / run.levels[0].alpha, [], []
    for t, here, there in pairs(run):
        slopes = [(x - run.denoised(x, here, t)) / here, *slopes][:4]
        nodes = [here, *nodes][:4]
        for i, slope in enumerate(slopes):
            x = x + quad(lambda s, i=i, nodes=nodes: lagrange(nodes, i, s), here, there, epsabs=1e-12)[0] * slope
    return x


def ipndm(run):
    x, slopes = run.start / run.levels[0].alpha, []
    for t, here, there in pairs(run):
        slopes = [(x - run.denoised(x, here, t)) / here, *slopes][:4]
        weights = {1: [1], 2: [3 / 2, -1 / 2], 3: [23 / 12, -16 / 12, 5 / 12], 4: [55 / 24, -59 / 24, 37 / 24, -9 / 24]}
        x = x + (there - here) * sum(w * s for w, s in zip(weights[len(slopes)], slopes, strict=True))
    return x


def euler(run):
    x = run.start / run.levels[0].alpha
    for t, here, there in pairs(run):
        x = x + (there - here) * (x - run.denoised(x, here, t)) / here
    return x


def euler_ancestral(run):
    x = run.start / run.levels[0].alpha
    for t, here, there in pairs(run):
        down, up = ancestral_step(here, there)
        x = x + (down - here) * (x - run.denoised(x, here, t)) / here
        x = x + up * run.noise()
    return x


def heun(run):
    x = run.start / run.levels[0].alpha
    ts = [level.t for level in run.levels]
    for i, (t, here, there) in enumerate(pairs(run)):
        d = (x - run.denoised(x, here, t)) / here
        x_2 = x + (there - here) * d
        if there > 0:
            x_2 = x + (there - here) * (d + (x_2 - run.denoised(x_2, there, ts[i + 1])) / there) / 2
        x = x_2
    return x


def _dpm_2(run, ancestral):
    x = run.start / run.levels[0].alpha
    for t, here, there in pairs(run):
        down, up = ancestral_step(here, there) if ancestral else (there, 0.0)
        d = (x - run.denoised(x, here, t)) / here
        if down == 0:
            x = x + (down - here) * d
            continue
        mid = math.exp((math.log(here) + math.log(down)) / 2)
        x_2 = x + (mid - here) * d
        x = x + (down - here) * (x_2 - run.denoised(x_2, mid, run.t_of(mid))) / mid + up * run.noise()
    return x


def dpm_2(run):
    return _dpm_2(run, False)


def dpm_2_ancestral(run):
    return _dpm_2(run, True)


def dpmpp_2s_ancestral(run):
    x = run.start / run.levels[0].alpha
    for t, here, there in pairs(run):
        down, up = ancestral_step(here, there)
        denoised = run.denoised(x, here, t)
        if down == 0:
            x = denoised
            continue
        h = math.log(here) - math.log(down)
        mid = math.exp(-(-math.log(here) + h / 2))
        x_2 = mid / here * x - math.expm1(-h / 2) * denoised
        x = down / here * x - math.expm1(-h) * run.denoised(x_2, mid, run.t_of(mid)) + up * run.noise()
    return x


def dpmpp_sde(run):
    """k-diffusion's sample_dpmpp_sde at r 1/2, its Brownian tree a sum of two increments."""
    x = run.start / run.levels[0].alpha
    for t, here, there in pairs(run):
        denoised = run.denoised(x, here, t)
        if there == 0:
            x = denoised
            continue
        mid = math.exp((math.log(here) + math.log(there)) / 2)
        down, up = ancestral_step(here, mid)
        w_mid = math.sqrt(here - mid) * run.noise()
        x_2 = (
            down / here * x
            - math.expm1(math.log(down) - math.log(here)) * denoised
            + up * w_mid / math.sqrt(here - mid)
        )
        denoised = run.denoised(x_2, mid, run.t_of(mid))
        w_all = w_mid + math.sqrt(mid - there) * run.noise()
        down, up = ancestral_step(here, there)
        x = (
            down / here * x
            - math.expm1(math.log(down) - math.log(here)) * denoised
            + up * w_all / math.sqrt(here - there)
        )
    return x


def dpmpp_2m(run):
    """k-diffusion's sample_dpmpp_2m, which ends on first order."""
    x, old, h_last = run.start / run.levels[0].alpha, None, None
    for t, here, there in pairs(run):
        denoised = run.denoised(x, here, t)
        if old is None or there == 0:
            x = (there / here) * x + (1 - there / here) * denoised
            h_last = math.log(here) - math.log(there) if there else None
        else:
            h = math.log(here) - math.log(there)
            r = h_last / h
            x = there / here * x - math.expm1(-h) * ((1 + 1 / (2 * r)) * denoised - 1 / (2 * r) * old)
            h_last = h
        old = denoised
    return x


def dpmpp_2m_sde(run):
    """k-diffusion's sample_dpmpp_2m_sde, midpoint, eta 1."""
    x, old, h_last = run.start / run.levels[0].alpha, None, None
    for t, here, there in pairs(run):
        denoised = run.denoised(x, here, t)
        if there == 0:
            return denoised
        h = math.log(here) - math.log(there)
        x = there / here * math.exp(-h) * x - math.expm1(-2 * h) * denoised
        if old is not None:
            x = x - 0.5 * math.expm1(-2 * h) * (h / h_last) * (denoised - old)
        x = x + there * math.sqrt(-math.expm1(-2 * h)) * run.noise()
        old, h_last = denoised, h
    return x


def dpmpp_3m_sde(run):
    """k-diffusion's sample_dpmpp_3m_sde, eta 1."""
    x, d_1, d_2, h_1, h_2 = run.start / run.levels[0].alpha, None, None, None, None
    for t, here, there in pairs(run):
        denoised = run.denoised(x, here, t)
        if there == 0:
            return denoised
        h = math.log(here) - math.log(there)
        h_eta = 2 * h
        x = math.exp(-h_eta) * x - math.expm1(-h_eta) * denoised
        phi_2 = math.expm1(-h_eta) / h_eta + 1
        if d_2 is not None:
            r0, r1 = h_1 / h, h_2 / h
            d1_0, d1_1 = (denoised - d_1) / r0, (d_1 - d_2) / r1
            d1 = d1_0 + (d1_0 - d1_1) * r0 / (r0 + r1)
            d2 = (d1_0 - d1_1) / (r0 + r1)
            x = x + phi_2 * d1 - (phi_2 / h_eta - 0.5) * d2
        elif d_1 is not None:
            x = x + phi_2 * (denoised - d_1) / (h_1 / h)
        x = x + there * math.sqrt(-math.expm1(-2 * h)) * run.noise()
        d_1, d_2, h_1, h_2 = denoised, d_1, h, h_1
    return x


def _dpmpp_2s(run, stochastic):
    """DPM-Solver++ algorithm 1 (for the SDE with twice the decay): steps of two levels, the stage at the middle one."""
    x, levels, i = run.start, run.levels, 0

    def lam(level):
        return math.log(level.alpha / level.sigma) if level.sigma else math.inf

    def move(x, here, there, image):
        h = lam(there) - lam(here)
        if stochastic:
            spread = there.sigma * math.sqrt(1 - math.exp(-2 * h)) * run.noise()
            return there.sigma / here.sigma * math.exp(-h) * x + there.alpha * (1 - math.exp(-2 * h)) * image + spread
        return there.sigma / here.sigma * x - there.alpha * (math.exp(-h) - 1) * image

    n = len(levels) - 1
    while i < n:
        here, middle = levels[i], levels[i + 1]
        image = run.image_and_noise(x, *here)[0]
        u = move(x, here, middle, image)
        if i + 2 > n or i + 2 == n:  # what is left ends on first order
            x = u
            i += 1
            continue
        there = levels[i + 2]
        r = (lam(middle) - lam(here)) / (lam(there) - lam(here))
        second = run.image_and_noise(u, *middle)[0]
        x = move(x, here, there, (1 - 1 / (2 * r)) * image + 1 / (2 * r) * second)
        i += 2
    return x


def dpmpp_2s(run):
    return _dpmpp_2s(run, False)


def dpmpp_2s_sde(run):
    return _dpmpp_2s(run, True)


def _uni_pc(run, bh1):
    """UniPC, algorithms 5 and 6 (data prediction), order 2: UniP with a = 1/2, UniC from the 2 x 2 system."""
    levels, x, history = run.levels, run.start, []
    lams = [math.log(level.alpha / level.sigma) if level.sigma else math.inf for level in levels]
    n = len(levels) - 1
    last = None
    for i in range(n):
        image = run.image_and_noise(x, *levels[i])[0]
        if i > 0:
            order, h = (1 if i == 1 else 2), lams[i] - lams[i - 1]
            base = levels[i].sigma / levels[i - 1].sigma * last - levels[i].alpha * math.expm1(-h) * history[0]
            scale = -h if bh1 else math.expm1(-h)
            if order == 1:
                x = base - levels[i].alpha * scale * 0.5 * (image - history[0])
            else:
                r = (lams[i - 2] - lams[i - 1]) / h
                phi_1 = math.expm1(-h) / -h - 1
                phi_2 = phi_1 / -h - 1 / 2
                a = np.linalg.solve([[1.0, 1.0], [r, 1.0]], [phi_1 / scale, 2 * phi_2 / scale])
                res = a[0] * (history[1] - history[0]) / r + a[1] * (image - history[0])
                x = base - levels[i].alpha * scale * res
        history, last = [image, *history], x
        if i == n - 1:
            return levels[n].alpha * image
        h = lams[i + 1] - lams[i]
        x = levels[i + 1].sigma / levels[i].sigma * last - levels[i + 1].alpha * math.expm1(-h) * image
        if i > 0:
            r, scale = (lams[i - 1] - lams[i]) / h, -h if bh1 else math.expm1(-h)
            x = x - levels[i + 1].alpha * scale * 0.5 * (history[1] - history[0]) / r
    return x


def uni_pc(run):
    return _uni_pc(run, False)


def uni_pc_bh1(run):
    return _uni_pc(run, True)


def deis(run):
    """tAB-DEIS of order 2 over log rho, its weights by quadrature; diffusers keeps the last of few steps to order 1."""
    x, eps, nodes, n = run.start / run.levels[0].alpha, [], [], len(run.levels) - 1
    for i, (t, here, there) in enumerate(pairs(run)):
        level = run.levels[i]
        eps = [run.image_and_noise(x * level.alpha, t, level.alpha, level.sigma)[1], *eps][:2]
        nodes = [math.log(here), *nodes][:2]
        order = 1 if i == n - 1 and n < 15 else len(eps)
        for j in range(order):
            weight = quad(lambda s, j=j, k=nodes[:order]: lagrange(k, j, math.log(s)), here, there, epsabs=1e-13)[0]
            x = x + weight * eps[j]
    return x * run.levels[-1].alpha


def sa_solver(run):
    """SA-Solver's 2-step predictor and 1-step corrector (order 2 both), its integrals by quadrature."""
    levels, n = run.levels, len(run.levels) - 1
    lams = [math.log(level.alpha / level.sigma) for level in levels]
    x, images, last, noise, tau = run.start, [], None, None, 0

    def step(x, i, k, nodes, values, noise, tau, extra):
        h, c = lams[k] - lams[i], 1 + tau**2
        out = levels[k].sigma / levels[i].sigma * math.exp(-(tau**2) * h) * x
        for j, value in enumerate(values):

            def integrand(u, j=j):
                return math.exp(c * (u - lams[k])) * lagrange(nodes, j, u)

            weight = quad(integrand, lams[i], lams[k], epsabs=1e-13)[0]
            if len(values) == 2:
                weight += extra(h, c) * (1 if j == 0 else -1)
            out = out + c * levels[k].alpha * weight * value
        return out + levels[k].sigma * math.sqrt(1 - math.exp(-2 * tau**2 * h)) * noise

    for i in range(n):
        images = [run.image_and_noise(x, *levels[i])[0], *images][:2]
        if i > 0:
            x = step(
                last, i - 1, i, [lams[i], lams[i - 1]], images, noise, tau,
                lambda h, c: h / 2 - (h * c - 1 + math.exp(-c * h)) / (c**2 * h),
            )  # fmt: skip
        last, noise, tau = x, run.noise(), int(200 <= levels[i].t <= 800)
        order = min(2, i + 1, n - i)
        if lams[i + 1] > lams[i]:
            x = step(
                x, i, i + 1, [lams[i], lams[i - 1]][:order], images[:order], noise, tau,
                lambda h, c, i=i: (h**2 / 2 - (h * c - 1 + math.exp(-c * h)) / c**2) / (lams[i] - lams[i - 1]),
            )  # fmt: skip
    return x


def lcm(run):
    x = run.start
    for i, level in enumerate(run.levels[:-1]):
        scaled = level.t * 10
        image = run.image_and_noise(x, level.t, level.alpha, level.sigma)[0]
        x = scaled / math.sqrt(scaled**2 + 0.25) * image + 0.25 / (scaled**2 + 0.25) * x
        if i + 2 < len(run.levels):
            b = run.abar(run.levels[i + 1].t)
            x = math.sqrt(b) * x + math.sqrt(1 - b) * run.noise()
    return x


def tcd(run):
    """TCD, algorithm 4: to (1 - gamma) of the next timestep, then noised up to it."""
    x, gamma = run.start, run.options["eta"]
    for i, level in enumerate(run.levels[:-1]):
        following = run.levels[i + 1].t if i + 2 < len(run.levels) else 0
        s = run.abar(math.floor((1 - gamma) * following))
        image, eps = run.image_and_noise(x, level.t, level.alpha, level.sigma)
        x = math.sqrt(s) * image + math.sqrt(1 - s) * eps
        if gamma > 0 and i + 2 < len(run.levels):
            b = run.abar(following)
            x = math.sqrt(b / s) * x + math.sqrt(1 - b / s) * run.noise()
    return x


LOOPS = {
    name: value
    for name, value in globals().items()
    if callable(value)
    and not name.startswith("_")
    and name not in ("Run", "quad", "pairs", "ancestral_step", "lagrange")
}
