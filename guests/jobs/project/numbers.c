#include "parts.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>

unsigned count_primes(unsigned below)
{
	unsigned char *composite = calloc(below, 1);
	unsigned count = 0;

	if (!composite)
		abort();
	for (unsigned n = 2; n < below; n++) {
		if (composite[n])
			continue;
		count++;
		for (uint64_t m = (uint64_t)n * n; m < below; m += n)
			composite[m] = 1;
	}
	free(composite);
	return count;
}

/* By Rabinowitz and Wagon's spigot: in the base of factorials e is 1.1111... */
void digits_of_e(char *text, int digits)
{
	enum { LENGTH = 1000 };
	unsigned place[LENGTH];

	for (int i = 0; i < LENGTH; i++)
		place[i] = 1;
	*text++ = '2';
	*text++ = '.';
	while (digits--) {
		unsigned carry = 0;
		for (int i = LENGTH - 1; i >= 0; i--) {
			unsigned value = place[i] * 10 + carry;
			place[i] = value % (unsigned)(i + 2);
			carry = value / (unsigned)(i + 2);
		}
		*text++ = (char)('0' + carry);
	}
	*text = 0;
}

/* How far a matrix by its inverse is from 1. */
double inverse_error(int size)
{
	double a[64][64], left[64][64], right[64][64], worst = 0;
	uint32_t random = 1;

	if (size > 64)
		abort();
	for (int i = 0; i < size; i++)
		for (int j = 0; j < size; j++) {
			a[i][j] = next_random(&random) / 4294967296.0 + (i == j ? size : 0);
			right[i][j] = i == j;
		}
	memcpy(left, a, sizeof a);
	for (int k = 0; k < size; k++) {
		double pivot = left[k][k];
		for (int j = 0; j < size; j++) {
			left[k][j] /= pivot;
			right[k][j] /= pivot;
		}
		for (int i = 0; i < size; i++) {
			double factor = left[i][k];
			for (int j = 0; i != k && j < size; j++) {
				left[i][j] -= factor * left[k][j];
				right[i][j] -= factor * right[k][j];
			}
		}
	}
	for (int i = 0; i < size; i++)
		for (int j = 0; j < size; j++) {
			double sum = 0;
			for (int k = 0; k < size; k++)
				sum += a[i][k] * right[k][j];
			worst = fmax(worst, fabs(sum - (i == j)));
		}
	return worst;
}
