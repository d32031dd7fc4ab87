#include "parts.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int main(void)
{
	enum { SIZE = 1000000 };
	unsigned char *plain = malloc(SIZE), *packed = malloc(4 * SIZE), *again = malloc(SIZE);
	unsigned char digest[32];
	char e[64];
	uint32_t random = 7;

	if (!plain || !packed || !again)
		return 1;
	printf("crc32 %08x\n", crc32("123456789", 9));
	memset(plain, 'a', SIZE);
	sha256(plain, SIZE, digest);
	printf("sha256 ");
	for (int i = 0; i < 32; i++)
		printf("%02x", digest[i]);
	printf("\nprimes %u\n", count_primes(1000000));
	printf("queens %u\n", count_queens(9));
	digits_of_e(e, 40);
	printf("e %s\n", e);
	printf("inverse %s\n", inverse_error(64) < 1e-12 ? "good" : "bad");
	printf("sorted %s\n", sorts_well(50000) ? "good" : "bad");
	for (int i = 0; i < SIZE; i++)
		plain[i] = (unsigned char)(i % 1000 < 700 ? (uint32_t)i % 50 : next_random(&random));
	size_t size = compress(plain, SIZE, packed);
	int whole = expand(packed, size, again) == SIZE && !memcmp(plain, again, SIZE);
	printf("compressed %s\n", size < SIZE * 2 / 3 && whole ? "good" : "bad");
	return 0;
}
