/* What the parts offer to one another. */
#include <stddef.h>
#include <stdint.h>

/* Numbers that look random and are the same everywhere. */
static inline uint32_t next_random(uint32_t *state)
{
	*state ^= *state << 13;
	*state ^= *state >> 17;
	*state ^= *state << 5;
	return *state;
}

uint32_t crc32(const void *data, size_t size);
void sha256(const void *data, size_t size, unsigned char digest[32]);
size_t compress(const unsigned char *from, size_t size, unsigned char *to);
size_t expand(const unsigned char *from, size_t size, unsigned char *to);
unsigned count_primes(unsigned below);
void digits_of_e(char *text, int digits);
double inverse_error(int size);
unsigned count_queens(unsigned size);
int sorts_well(size_t count);
