#include "parts.h"

uint32_t crc32(const void *data, size_t size)
{
	static uint32_t table[256];
	const unsigned char *at = data;
	uint32_t sum = 0xffffffffu;

	for (unsigned byte = 0; byte < 256; byte++) {
		uint32_t value = byte;
		for (int bit = 0; bit < 8; bit++)
			value = value & 1 ? 0xedb88320u ^ value >> 1 : value >> 1;
		table[byte] = value;
	}
	while (size--)
		sum = table[(sum ^ *at++) & 0xff] ^ sum >> 8;
	return ~sum;
}
