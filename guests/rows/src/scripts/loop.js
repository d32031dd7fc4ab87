// A row of `rows`: what scripts do all day.
function primes(below) {
  const composite = new Uint8Array(below);
  let count = 0;
  for (let n = 2; n < below; n++) {
    if (composite[n]) continue;
    count++;
    for (let m = n * n; m < below; m += n) composite[m] = 1;
  }
  return count;
}

function words(count) {
  const all = Array.from({ length: count }, (_, n) => ({ n, x: "x".repeat(n % 5) }));
  const again = JSON.parse(JSON.stringify(all));
  const lengths = new Map();
  for (const { n, x } of again) lengths.set(n % 1000, (lengths.get(n % 1000) ?? 0) + x.length);
  return [...lengths.values()].reduce((sum, length) => sum + length, 0);
}

const fib = (n) => (n < 2 ? n : fib(n - 1) + fib(n - 2));

// An n-queens search over closures and arrays, which the garbage collector has work with.
function queens(size, row = 0, placed = []) {
  if (row === size) return 1;
  let count = 0;
  for (let column = 0; column < size; column++) {
    const safe = placed.every((at, y) => at !== column && Math.abs(at - column) !== row - y);
    if (safe) count += queens(size, row + 1, [...placed, column]);
  }
  return count;
}

let said;
for (let turn = 0; turn < 6; turn++) {
  said = [primes(300_000), words(20_000), fib(24), queens(8)];
}
console.log(...said);
