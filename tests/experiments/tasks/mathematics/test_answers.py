"""Classes of answers to the verifier of mathematics. A row is a reference, an arrow and the content of a box."""

import pytest

from experiments.tasks.mathematics.verifier import is_readable, judge

RIGHT = {
    "exact numbers": r"""
        \frac54 <- 1 1/4
        \frac54 <- 1\frac14
        1 1/4 <- 1.25
        -1\frac12 <- -1.5
        1200 <- 1\,200
        1{,}200 <- 1200
        1200000 <- 1 200 000
        10,\!080 <- 10080
        \frac32 <- 1½
        3/2 <- 1.5
        -\frac12 <- \frac{1}{-2}
        \frac34 <- 3/4
        \frac{52!}{52^{52}} <- \frac{51!}{52^{51}}
        \frac1{2^{2024}} <- 2^{-2024}
        2^{2^{10}} <- 2^{1024}
        5. <- 5.
        5. <- 5
        0.\overline{3} <- 0.\overline{3}
        0.\overline{3} <- \frac13
        0.1\overline{6} <- 1/6
        0.\dot{1}\dot{8} <- \frac{2}{11}
        2e-05 <- 2e-05
        2e-05 <- 0.00002
        6.02e23 <- 6.02 \times 10^{23}
        4 \cdot 10^{5} <- 400{,}000
        \frac13 <- 0.333333
        \frac{2}{3} <- 0.6666667
        3.14159265 <- \pi
    """,
    "irrational numbers": r"""
        2\sqrt3 <- 2√3
        \sqrt{8} <- 2\sqrt2
        \sqrt{5+2\sqrt6} <- \sqrt2+\sqrt3
        \frac{\sqrt{3}}{3} <- \frac{1}{\sqrt3}
        \sqrt[3]{-8} <- -2
        \frac{\pi}{2} <- pi/2
        \frac{3}{4}\pi <- 3/4 \pi
        \arctan 1 <- \frac\pi4
        \log_2 8 <- 3
        \ln 8 <- 3\ln 2
        \mathrm{e} <- e
        e <- \mathrm{e}
        2\mathrm{i} <- 2i
        e^{i\pi/3} <- \frac12+\frac{\sqrt3}{2}i
        (1+i)^2 <- 2i
    """,
    "expressions with letters": r"""
        x^{2}-1 <- (x-1)(x+1)
        x^6 <- (x^2)^3
        e^{2x} <- (e^x)^2
        2^{200} <- (2^{100})^2
        720 <- (3!)!
        \sqrt{3/n} <- \frac{\sqrt3}{\sqrt n}
        \sin 2x <- 2\sin x\cos x
        \cos^2 x <- 1-\sin^2 x
        \binom{2n}{n} <- \frac{(2n)!}{n!^2}
        (-1)^{n+1} <- -(-1)^n
        (-1)^n n <- n\cos(n\pi)
        \lceil n/2\rceil <- \lfloor (n+1)/2\rfloor
        a^2b <- baa
        (\gamma-1)mc^2 <- \gamma mc^2-mc^2
        R-r <- -r+R
        I_0 <- I_{0}
        \ln x^2 <- 2\ln x
        1.25P <- \frac{5P}{4}
        13p-30 <- \text{13p-30}
        \frac{x+1}{2} <- {x+1 \over 2}
        \binom{10}{3} <- {10 \choose 3}
    """,
    "equations and names": r"""
        \frac{5!}{2!}=60 <- 60
        2+3=5 <- 5
        10/3 <- \frac{10}{3} \approx 3.33
        x=5 <- 5=x
        x=5 <- x=2+3=5
        y=2x+3 <- 2x-y+3=0
        y=2x+3 <- 2x+3
        x+y=3 <- 2x+2y-6=0
        f(x)=2x <- f(n)=2n
        x=2, y=1 <- y=1, x=2
        x=2, y=1 <- (2,1)
        x=2, y=1 <- (x,y)=(2,1)
        x=0, x=\pm2\sqrt2 <- 0, 2\sqrt2, -2\sqrt2
        x=1 \text{ or } x=2 <- 2, 1
        n=6k+1, k\in\mathbb N <- n=6k+1, k\in\mathbb{N}
        p \equiv 1 \pmod 4 <- p\equiv1 \ (\text{mod } 4)
        SRMC=LRMC <- LRMC=SRMC
        f(2)=5 <- 5
        y=2x+3 <- x=\frac{y-3}{2}
        (x+1)^2=x^2+2x+1 <- x^2+2x+1
        f(x,y)=x-y <- f(s,t)=s-t
        f(1)<f(2) <- f(2)>f(1)
        [x=1, y=2, z=-5] <- (1,2,-5)
        (x=1,y=2) <- x=1,y=2
        \min\{a,b\} <- \min(b,a)
    """,
    "intervals and sets": r"""
        (-\infty,3] <- x\le3
        x\le3 <- (-\infty,3]
        (2,5] <- 2<x\leq 5
        (2,5] <- 5 \ge x > 2
        x<1 \text{ or } x>2 <- (-\infty,1)\cup(2,\infty)
        (-\infty,1)\cup(2,\infty) <- x > 2 \text{ or } x < 1
        \{x \mid x>2\} <- (2,\infty)
        \{x : x>2\} <- x>2
        x \ne 2 <- (-\infty,2)\cup(2,\infty)
        \mathbb{R} <- (-\infty,\infty)
        x \in [-2,7] <- -2 \le x \le 7
        \{1,2,3\} <- \{3,2,1\}
        1,2,\ldots,m <- 1, 2, \dots, m
        2x+y \le 4 <- 8 \ge 4x+2y
        x < -7:(-\infty,-7) <- (-\infty,-7)
        n<1 \text{ or } n>2:(-\infty,1)\cup(2,\infty) <- n>2 \text{ or } n<1
    """,
    "vectors and matrices": r"""
        \begin{pmatrix}1\\2\end{pmatrix} <- (1,2)
        (1,2) <- \begin{pmatrix}1\\2\end{pmatrix}
        (1,2) <- \langle 1,2\rangle
        \begin{pmatrix}1&2\\3&4\end{pmatrix} <- \begin{bmatrix}1&2\\3&4\end{bmatrix}
        \frac{1}{2}\begin{pmatrix}2\\4\end{pmatrix} <- \begin{pmatrix}1\\2\end{pmatrix}
        \begin{vmatrix}1&2\\3&4\end{vmatrix}=-2 <- -2
        (312,123,231) <- (312, 123, 231)
    """,
    "units, times, ratios": r"""
        45 <- 45°
        45^\circ <- 45°
        45^\circ <- \frac{\pi}{4}
        50\% <- \frac12
        50 <- 50\%
        18 <- 18 apples
        18 <- \$18
        5 \text{ cm} <- 50 \text{ mm}
        5\mathrm{~cm} <- 5
        5\,\mathrm{m} <- 5
        1 \text{ foot} <- 12 \text{ inches}
        2 \text{ hours } 15 \text{ minutes} <- 135 \text{ minutes}
        2 \text{ hours } 15 \text{ minutes} <- 2 hours 15 minutes
        9.8 \text{ m/s}^2 <- 9.8
        8:20 <- 8:20 \text{ a.m.}
        3:00 pm <- 15:00
        2:3 <- 4:6
        2:3 <- \frac23
        52_8 <- 52_{8}
        5 \text{ million} <- 5000000
        18^\text{th} <- 18
        12\mathrm{~min} <- 12
        \frac12 \text{ min} <- 30 \text{ seconds}
        120 min <- 2 hours
        9 (apples) <- 9
        9 (cats) <- 9 \text{ cats}
        12 <- 12 \text{ pieces of candy}
        6.6 \mathrm{~L}/\mathrm{min} <- 6.6
        22 \mathrm{~J} \mathrm{~K}^{-1} \mathrm{~mol}^{-1} <- 22
        -37_8 <- -37_{8}
        -37_8 <- -37
        \approx 17.10 \mathrm{~ft} <- 17.10
        About 30.12 miles per hour <- 30.12
    """,
    "words": r"""
        No solution. <- No solution.
        No solution. <- \text{no solution}
        \text{Yes} <- YES
        no <- No
        \text{(C)} <- C
        42 <- \text{The answer is } 42
        42 <- The answer is $42$.
        42 <- \text{Answer: } 42
    """,
}

WRONG = {
    "case": r"""
        R-r <- 0
        \frac{M}{m} <- 1
        \binom{N}{n} <- 1
        \frac{M}{M+m} <- \frac12
        V/v <- 1
        AB <- ab
        \Delta-\delta <- 0
        F(x)=2x <- f(x)=2x
        \mathcal{L}-L <- 0
    """,
    "powers": r"""
        x^5 <- (x^2)^3
        2^{201} <- (2^{100})^2
        x^9 <- x^2^3
        720 <- 3!!
    """,
    "parts of formulas": r"""
        \{x \mid x>2\} <- 2
        \{x \mid x>2\} <- \{x \mid x<2\}
        n=6k+1, k\in\mathbb N <- 6
        n=6k+1, k\in\mathbb N <- n=6k+5, k\in\mathbb N
        \begin{cases} 1 & x>0 \\ 2 & x<0 \end{cases} <- \begin{cases} 3 & x>0 \\ 2 & x<0 \end{cases}
        p \equiv 1 \pmod 4 <- 4
        p \equiv 1 \pmod 4 <- p \equiv 3 \pmod 4
        1,2,\ldots,m <- 1,3,\ldots,2m-1
        x=0, x=\pm2\sqrt2 <- 2
        \pm 2 <- 2
        \int_0^1 x\,dx <- 1
        \sum_{k=1}^n k^2 <- \sum_{k=1}^n k^3
        f(n)=n, g(n)=1 <- n
        3 <- \text{at least } 3
        3 <- \text{not } 3
        3 <- 3 \text{ if } n \text{ is even}
        a \to b <- a \to c
        0.333\ldots <- 0.333
        I(0) <- 0
        \frac{dx}{dt} <- \frac{x}{t}
    """,
    "large and small numbers": r"""
        \frac{2^{99}+1}{3\cdot2^{100}} <- \frac{7\cdot2^{99}}{2^{100}}
        \frac1{2^{2024}} <- \frac1{2^{2023}}
        \frac{52!}{52^{52}} <- \frac{52!}{52^{51}}
        1-(2/3)^{100} <- 1-(2/3)^{99}
        \binom{100}{50} <- \binom{100}{49}
        10^{100}+1 <- 10^{100}
        e^{-1000} <- 0
        e^{-1000000}+1 <- 1
        \sin \pi <- e^{-1000}
        \sqrt2+10^{-300} <- \sqrt2
        3^{1/1000000} <- 1
        \frac13 <- 0.33333
        0.333333 <- 0.333334
        10/3 <- 3.33
    """,
    "equations": r"""
        \frac{5!}{2!}=60 <- 0=0
        2+3=5 <- 2+3=6
        5 <- x=5=6
        \begin{vmatrix}1&2\\3&4\end{vmatrix}=-2 <- \begin{vmatrix}5&2\\3&4\end{vmatrix}=99
        \begin{vmatrix}1&2\\3&4\end{vmatrix}=-2 <- \begin{vmatrix}1&2\\3&4\end{vmatrix}=99
        y=2x+3 <- y=2x+4
        y=2x+3 <- 0=0
        k=3 <- n=3
        x=2, y=1 <- (1,2)
        x=2, y=1 <- 1,2
        a=3,b=5 <- 5,3
        a=3,b=5 <- a=5,b=3
        2x+y \le 4 <- 2x+y \ge 4
        f(2)<f(1)<f(4) <- f(3)<f(1)<f(4)
        f(2)<f(1) <- g(2)<g(1)
        f(1)+1=0 <- f(2)+1=0
        f(t)=1-e^{-t} <- f(T)=1-e^{-t}
        f(x)=ax <- f(a)=ax
        E(X)=2, E(Y)=3 <- E(X)=3, E(Y)=2
        (x+1)^2=x^2+2x+1 <- 0=0
        \frac{-1}{\sin\arctan t}+C=-\frac{\sqrt{1+t^2}}{t}+C <- \
            \frac x2-\frac{\sin 2x}4+C=\frac x2-\frac{\sin x\cos x}2+C
        y=2x+3 <- x=\frac{y+3}{2}
        x < -7:(-\infty,7) <- (-\infty,-7)
    """,
    "letters": r"""
        (\gamma-1)mc^2 <- (\gamma-2)mc^2
        \gamma^2+1 <- \gamma^2+2
        \zeta+1 <- \zeta+2
        \beta-1 <- \beta-2
        I_0 <- I_1
        I_0 <- J_0
        S+1 <- S+2
        \Gamma(5) <- 24
        \frac10 <- \frac20
        \log 0 <- -\infty
        \infty <- -\infty
        |x| <- x
        \sqrt{x^2} <- x
        \lfloor x\rfloor <- x
        x/|x| <- 1
        n^6 <- n^6+(n-1)(n-2)(n-3)(n-4)(n-5)(n-6)
        \lfloor\sqrt{n-1}\rfloor <- \lfloor\sqrt{n-2}\rfloor
    """,
    "vectors and intervals": r"""
        \mathbf x=\begin{pmatrix}1\\2\end{pmatrix}+t\begin{pmatrix}3\\4\end{pmatrix} <- \
            \mathbf x=\begin{pmatrix}1\\3\end{pmatrix}+t\begin{pmatrix}3\\4\end{pmatrix}
        \begin{pmatrix}1\\2\end{pmatrix} <- (2,1)
        \begin{pmatrix}1&2\end{pmatrix} <- \begin{pmatrix}1\\2\end{pmatrix}
        (1,2) <- [1,2]
        (1,2) <- \{1,2\}
        1,2 <- (2,1)
        (-\infty,3] <- x<3
        x\le3 <- x\ge3
        (2,\infty) <- (-\infty,2)\cup(2,\infty)
        (1,234) <- 1234
    """,
    "words, units, times": r"""
        ABCD <- BCAD
        seat <- east
        ab <- ba
        8:20 <- 4:10
        8:20 \text{ am} <- 8:20 \text{ pm}
        2 \text{ hours } 15 \text{ minutes} <- 2 \text{ hours } 45 \text{ minutes}
        2 \text{ hours } 15 \text{ minutes} <- 15
        15 \text{ cm} <- 15 \text{ m}
        864 \text{ in}^2 <- 864 \text{ in}^3
        5 \text{ cents} <- 5 \text{ dollars}
        50\% <- 5000\%
        36^\circ <- \$36
        8\% <- 8 \text{ cm}
        52_8 <- 52_9
        2:3 <- 3:2
        5 <- 5 \text{ million}
        5 <- 5 \text{ squared}
        3 <- 3 \text{ to } x
        12 <- 3\times4 \text{ matrix}
        p \land q <- p \lor q
        12 \text{ min} <- 12 \text{ seconds}
        -37_8 <- 37_8
        -37_8 <- -37_9
        22 \mathrm{~J} \mathrm{~K}^{-1} <- 22 \mathrm{~J} \mathrm{~s}^{-1}
        6.6 \mathrm{~L}/\mathrm{min} <- 6.6 \mathrm{~L}/\mathrm{s}
        5 <- 5 \text{ of } x
        f(2)=5 <- f(3)=5
    """,
}


def rows(table: dict[str, str]) -> list[tuple[str, str]]:
    lines = [line.strip() for text in table.values() for line in text.replace("\\\n", "").splitlines() if line.strip()]
    return [tuple(part.strip() for part in line.split("<-")) for line in lines]  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize("name", RIGHT)
def test_answers_that_mean_the_same_are_right(name):
    refused = [row for row in rows({name: RIGHT[name]}) if not is_right(*row)]
    assert not refused


@pytest.mark.parametrize("name", WRONG)
def test_answers_that_mean_something_else_are_wrong(name):
    paid = [row for row in rows({name: WRONG[name]}) if is_right(*row)]
    assert not paid


def test_every_reference_is_earned_by_its_own_text():
    unearned = [answer for answer, _ in rows(RIGHT) + rows(WRONG) if not is_right(answer, answer)]
    assert not unearned


def test_references_of_right_answers_are_readable():
    assert not [answer for answer, _ in rows(RIGHT) if not is_readable(answer)]
    unreadable = (r"\int_0^1 x\,dx", r"a \to b", r"\frac10", r"\begin{cases} 1 & x>0 \\ 2 & x<0 \end{cases}", "2+3=6")
    assert not [answer for answer in unreadable if is_readable(answer)]


@pytest.mark.parametrize(
    "hostile",
    [
        "9^{9^{9^{9}}}",
        "9^{" * 60 + "9" + "}" * 60,
        r"\{" * 300 + "1" + r"\}" * 300,
        r"\text{" * 300 + "1" + "}" * 300,
        r"\sin" * 400 + "1",
        "2" + " x" * 900,
        "2" + "*2" * 490,
        "(" * 900 + "1" + ")" * 900,
        "9" * 1_999,
        "((9!)!)!",
        r"\sin(10^{10^{10}})",
        r"e^{e^{e^{e^{e}}}}",
        r"(1+\sqrt2)^{10^9!}",
        r"\lfloor 9^{9^9}\sqrt2\rfloor",
        r"(\pi+1000)!",
        ",".join(rf"\sqrt{{{number}}}" for number in range(2, 90)),
        r"\pm" * 300 + "1",
        "\\frac{1}{" * 140 + "18" + "}" * 140,
        "(" + "+".join(f"x_{{{index}}}" for index in range(60)) + ")^{50}",
    ],
    ids=lambda text: text[:20],
)
def test_hostile_answers_are_wrong_without_much_work(hostile, monkeypatch):
    """The verifier itself refuses them; no limit of time has to."""
    assert not is_right("18", hostile)
    assert not is_right(r"\sqrt{2}", hostile)


def is_right(answer: str, given: str) -> bool:
    return judge((answer, f"So it is $\\boxed{{{given}}}$.", True))["correct"]
