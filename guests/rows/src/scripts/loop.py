# A row of `rows`: what scripts do all day.
import json


def primes(below):
    composite, count = set(), 0
    for n in range(2, below):
        if n not in composite:
            count += 1
            composite.update(range(n * n, below, n))
    return count


def words(count):
    text = json.dumps([{"n": n, "x": "x" * (n % 5)} for n in range(count)])
    return sum(len(word["x"]) for word in json.loads(text))


def fib(n):
    return n if n < 2 else fib(n - 1) + fib(n - 2)


for _ in range(3):
    said = primes(50_000), words(20_000), fib(22)
print(*said)
