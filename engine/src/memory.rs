//! How much memory this process could still take.

use std::path::{Path, PathBuf};

/// Where a system does not say how much memory is free.
const UNKNOWN_FREE_BYTES: u64 = 4 << 30;

/// Bytes that this process could still take: what the system has, within what its control groups allow.
pub(crate) fn free_memory() -> u64 {
    free_memory_at(Path::new("/"))
}

/// The same for a system whose `proc` and `sys` lie below `root`.
fn free_memory_at(root: &Path) -> u64 {
    let system = read(&root.join("proc/meminfo")).and_then(|text| mem_available(&text)).unwrap_or(UNKNOWN_FREE_BYTES);
    let groups = read(&root.join("proc/self/cgroup")).unwrap_or_default();
    let mounted = root.join("sys/fs/cgroup");
    let mut allowed = u64::MAX;
    // Where the file says nothing, the group that is mounted as the root still counts.
    for line in groups.lines().chain(["0::/", "1:memory:/"]) {
        let mut parts = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (parts.next(), parts.next()) else { continue };
        if controllers.is_empty() {
            // Beside groups of the first version, those of the second lie in a folder of their own.
            allowed = allowed.min(VERSION_2.left(&mounted, path)).min(VERSION_2.left(&mounted.join("unified"), path));
        } else if controllers.split(',').any(|controller| controller == "memory") {
            allowed = allowed.min(VERSION_1.left(&mounted.join(controllers), path));
            allowed = allowed.min(VERSION_1.left(&mounted.join("memory"), path));
        }
    }
    system.min(allowed)
}

/// Names of a control group's files.
struct GroupFiles {
    max: &'static str,
    current: &'static str,
    /// Keys of `memory.stat` for file pages, those of the groups below counted in. The kernel gives such pages up when
    /// memory is wanted; right after a model was read they are as many as its files.
    file_pages: [&'static str; 2],
}

const VERSION_1: GroupFiles = GroupFiles {
    max: "memory.limit_in_bytes",
    current: "memory.usage_in_bytes",
    file_pages: ["total_inactive_file ", "total_active_file "],
};
const VERSION_2: GroupFiles =
    GroupFiles { max: "memory.max", current: "memory.current", file_pages: ["inactive_file ", "active_file "] };

impl GroupFiles {
    /// Bytes that the group at `path` and all groups above it leave. Those that are not there, or have no limit, leave
    /// everything: in a container the path can be one that only its host knows.
    fn left(&self, mounted: &Path, path: &str) -> u64 {
        // A path that climbs is a group outside of what is mounted.
        let parts = path.split('/').filter(|part| !part.is_empty() && *part != "..");
        let mut groups: Vec<PathBuf> = vec![mounted.to_owned()];
        for part in parts {
            let below = groups.last().map(|group| group.join(part));
            groups.extend(below);
        }
        groups.iter().filter_map(|group| self.left_in(group)).min().unwrap_or(u64::MAX)
    }

    fn left_in(&self, group: &Path) -> Option<u64> {
        let number = |name: &str| read(&group.join(name))?.trim().parse::<u64>().ok();
        let (max, current) = (number(self.max)?, number(self.current)?);
        let stat = read(&group.join("memory.stat")).unwrap_or_default();
        Some(max.saturating_sub(current.saturating_sub(self.cached(&stat))))
    }

    fn cached(&self, memory_stat: &str) -> u64 {
        let value = |key: &str| -> Option<u64> {
            memory_stat.lines().find_map(|line| line.strip_prefix(key)?.trim().parse().ok())
        };
        self.file_pages.iter().filter_map(|key| value(key)).sum()
    }
}

fn read(path: &Path) -> Option<String> {
    std::fs::read_to_string(path).ok()
}

fn mem_available(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kibibytes.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Free memory of a system of 1000 KiB with these files.
    fn free(files: &[(&str, &str)]) -> u64 {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in files.iter().chain(&[("proc/meminfo", "MemTotal: 9 kB\nMemAvailable:   1000 kB\n")]) {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        free_memory_at(root.path())
    }

    #[test]
    fn a_limit_counts_in_every_version_and_at_every_level() {
        assert_eq!(free(&[]), 1_024_000);
        let in_root = [("sys/fs/cgroup/memory.max", "500\n"), ("sys/fs/cgroup/memory.current", "100\n")];
        assert_eq!(free(&in_root), 400);
        // The second version: the process's own group, one above it, and a path that is not mounted here.
        let own = ("proc/self/cgroup", "0::/a.slice/b.service\n");
        let own_limit = [
            ("sys/fs/cgroup/a.slice/b.service/memory.max", "900"),
            ("sys/fs/cgroup/a.slice/b.service/memory.current", "1"),
        ];
        let above = [("sys/fs/cgroup/a.slice/memory.max", "700"), ("sys/fs/cgroup/a.slice/memory.current", "50")];
        assert_eq!(free(&[own, own_limit[0], own_limit[1]]), 899);
        assert_eq!(free(&[own, own_limit[0], own_limit[1], above[0], above[1]]), 650);
        let no_limit = ("sys/fs/cgroup/a.slice/memory.max", "max\n");
        assert_eq!(free(&[own, own_limit[0], own_limit[1], no_limit, above[1]]), 899);
        let elsewhere = ("proc/self/cgroup", "0::/../../host/pod\n");
        assert_eq!(free(&[elsewhere, in_root[0], in_root[1]]), 400);
        // The first version, alone or mounted together with others.
        let first = ("proc/self/cgroup", "9:cpu:/x\n8:memory:/docker/c\n0::/\n");
        let limit = [
            ("sys/fs/cgroup/memory/docker/c/memory.limit_in_bytes", "600"),
            ("sys/fs/cgroup/memory/docker/c/memory.usage_in_bytes", "200"),
            ("sys/fs/cgroup/memory/docker/c/memory.stat", "cache 9\ninactive_file 7\ntotal_inactive_file 30\n"),
        ];
        assert_eq!(free(&[first, limit[0], limit[1]]), 400);
        assert_eq!(free(&[first, limit[0], limit[1], limit[2]]), 430);
        let unlimited = ("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712");
        let used = ("sys/fs/cgroup/memory/memory.usage_in_bytes", "5");
        assert_eq!(free(&[first, limit[0], limit[1], unlimited, used]), 400);
    }

    #[test]
    fn file_pages_of_a_control_group_count_as_free() {
        assert_eq!(VERSION_2.cached("anon 5\nfile 9\ninactive_file 4\nactive_file 3\n"), 7);
        assert_eq!(VERSION_2.cached("anon 5\n"), 0);
    }

    #[test]
    fn meminfo_is_read_in_kibibytes() {
        assert_eq!(mem_available("MemTotal: 8 kB\nMemAvailable:   12 kB\n"), Some(12288));
        assert_eq!(mem_available("MemTotal: 8 kB\n"), None);
    }
}
