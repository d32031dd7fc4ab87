#include "parts.h"
#include <math.h>
#include <string.h>

/* The first 32 bits of the fractions of roots of primes are the function's constants. */
static void constants(uint32_t start[8], uint32_t round[64])
{
	unsigned found = 0;

	for (unsigned n = 2; found < 64; n++) {
		unsigned divisor = 2;
		while (divisor * divisor <= n && n % divisor)
			divisor++;
		if (divisor * divisor <= n)
			continue;
		long double third = cbrtl(n), half = sqrtl(n);
		round[found] = (uint32_t)((third - floorl(third)) * 4294967296.0L);
		if (found < 8)
			start[found] = (uint32_t)((half - floorl(half)) * 4294967296.0L);
		found++;
	}
}

static uint32_t turn(uint32_t value, int by)
{
	return value >> by | value << (32 - by);
}

static void block(uint32_t state[8], const uint32_t round[64], const unsigned char *at)
{
	uint32_t w[64], s[8];

	for (int i = 0; i < 16; i++, at += 4)
		w[i] = (uint32_t)at[0] << 24 | at[1] << 16 | at[2] << 8 | at[3];
	for (int i = 16; i < 64; i++)
		w[i] = w[i - 16] + w[i - 7] +
		       (turn(w[i - 15], 7) ^ turn(w[i - 15], 18) ^ w[i - 15] >> 3) +
		       (turn(w[i - 2], 17) ^ turn(w[i - 2], 19) ^ w[i - 2] >> 10);
	memcpy(s, state, sizeof s);
	for (int i = 0; i < 64; i++) {
		uint32_t one = s[7] + (turn(s[4], 6) ^ turn(s[4], 11) ^ turn(s[4], 25)) +
			       ((s[4] & s[5]) ^ (~s[4] & s[6])) + round[i] + w[i];
		uint32_t two = (turn(s[0], 2) ^ turn(s[0], 13) ^ turn(s[0], 22)) +
			       ((s[0] & s[1]) ^ (s[0] & s[2]) ^ (s[1] & s[2]));
		memmove(s + 1, s, 7 * sizeof *s);
		s[4] += one;
		s[0] = one + two;
	}
	for (int i = 0; i < 8; i++)
		state[i] += s[i];
}

void sha256(const void *data, size_t size, unsigned char digest[32])
{
	const unsigned char *at = data;
	unsigned char last[128] = {0};
	uint32_t state[8], round[64];
	size_t left = size;

	constants(state, round);
	for (; left >= 64; left -= 64, at += 64)
		block(state, round, at);
	memcpy(last, at, left);
	last[left] = 0x80;
	size_t end = left < 56 ? 64 : 128;
	for (int i = 0; i < 8; i++)
		last[end - 1 - i] = (unsigned char)((uint64_t)size * 8 >> 8 * i);
	for (size_t i = 0; i < end; i += 64)
		block(state, round, last + i);
	for (int i = 0; i < 32; i++)
		digest[i] = (unsigned char)(state[i / 4] >> (24 - i % 4 * 8));
}
