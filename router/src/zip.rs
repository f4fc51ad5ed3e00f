//! Zip archives of a few small files, stored without compression (PKWARE's APPNOTE.TXT, sections 4.3 and 4.4).

/// An archive with these files in this order. Names and files are far below the format's limit of 4 GiB.
pub(crate) fn store(files: &[(&str, Vec<u8>)]) -> Vec<u8> {
    let mut archive = Vec::with_capacity(files.iter().map(|(name, bytes)| bytes.len() + 2 * name.len() + 80).sum());
    let mut directory = Vec::new();
    for (name, bytes) in files {
        let offset = archive.len() as u32;
        // From the version that is needed to the length of extra fields: the same in both kinds of header.
        let mut shared = Vec::with_capacity(26);
        // Version 2.0, names in UTF-8, stored; the first of January 1980, so that equal files make equal archives.
        for word in [20u16, 1 << 11, 0, 0, (1 << 5) | 1] {
            shared.extend(word.to_le_bytes());
        }
        for number in [crc32(bytes), bytes.len() as u32, bytes.len() as u32] {
            shared.extend(number.to_le_bytes());
        }
        for word in [name.len() as u16, 0] {
            shared.extend(word.to_le_bytes());
        }
        archive.extend(b"PK\x03\x04");
        archive.extend(&shared);
        archive.extend(name.as_bytes());
        archive.extend(bytes);

        directory.extend(b"PK\x01\x02");
        directory.extend(20u16.to_le_bytes());
        directory.extend(&shared);
        // No comment, disk 0, no attributes.
        directory.extend([0; 10]);
        directory.extend(offset.to_le_bytes());
        directory.extend(name.as_bytes());
    }
    let (offset, length, count) = (archive.len() as u32, directory.len() as u32, files.len() as u16);
    archive.extend(directory);
    archive.extend(b"PK\x05\x06");
    archive.extend([0; 4]);
    archive.extend(count.to_le_bytes());
    archive.extend(count.to_le_bytes());
    archive.extend(length.to_le_bytes());
    archive.extend(offset.to_le_bytes());
    archive.extend([0; 2]);
    archive
}

/// The checksum of ISO 3309, by a table of the remainders of single bytes.
fn crc32(bytes: &[u8]) -> u32 {
    const TABLE: [u32; 256] = {
        let mut table = [0u32; 256];
        let mut byte = 0;
        while byte < 256 {
            let mut remainder = byte as u32;
            let mut bit = 0;
            while bit < 8 {
                remainder = if remainder & 1 == 1 { 0xedb8_8320 ^ (remainder >> 1) } else { remainder >> 1 };
                bit += 1;
            }
            table[byte] = remainder;
            byte += 1;
        }
        table
    };
    !bytes.iter().fold(!0, |crc, byte| TABLE[((crc ^ u32::from(*byte)) & 0xff) as usize] ^ (crc >> 8))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_are_the_standards() {
        assert_eq!(crc32(b"123456789"), 0xcbf4_3926);
        assert_eq!(crc32(b""), 0);
    }

    #[test]
    fn the_directory_points_at_every_file() {
        let archive = store(&[("a.json", b"{}".to_vec()), ("b", vec![7; 100])]);
        let word = |at: usize| u32::from_le_bytes(archive[at..at + 4].try_into().expect("four bytes")) as usize;
        let end = archive.len() - 22;
        assert_eq!(&archive[end..end + 4], b"PK\x05\x06");
        let mut at = word(end + 16);
        for (name, bytes) in [("a.json", &b"{}"[..]), ("b", &[7; 100])] {
            assert_eq!(&archive[at..at + 4], b"PK\x01\x02");
            let local = word(at + 42);
            assert_eq!(&archive[local..local + 4], b"PK\x03\x04");
            let content = local + 30 + name.len();
            assert_eq!(&archive[local + 30..content], name.as_bytes());
            assert_eq!(&archive[content..content + bytes.len()], bytes);
            assert_eq!((word(local + 14), word(local + 18)), (crc32(bytes) as usize, bytes.len()));
            at += 46 + name.len();
        }
        assert_eq!(at, end);
    }
}
