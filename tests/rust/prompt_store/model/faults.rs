//! What goes wrong on the way: damaged records, damaged indices, failing disks, and what the dead leave.

use super::*;

impl Run {
    pub(super) fn record_files(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(self.root.join("records")).unwrap();
        let mut files: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
        files.sort();
        files
    }

    /// Damages a record, and forgets in the model what hangs on it.
    pub(super) fn damage_record(&mut self) {
        self.settle();
        let files = self.record_files();
        if files.is_empty() {
            return;
        }
        let path = self.random.pick(&files).clone();
        let id = path.file_name().unwrap().to_str().unwrap()[..64].to_owned();
        // One that hangs on nothing is found by nobody, but counts as stored.
        let lost = self.listed().remove(&id);
        let lost: Vec<Key> = lost.map_or_else(|| self.model.all.iter().cloned().collect(), |(key, _)| vec![key]);
        for (n, kind, covered) in lost {
            self.model.lose(n, kind, &covered);
            self.model.damaged.push((path.clone(), (n, kind, covered)));
        }
        let size = fs::metadata(&path).unwrap().len();
        self.note(format!("damage {id} {:?}", self.model.damaged.last()));
        match self.random.below(4) {
            0 => OpenOptions::new().write(true).open(&path).unwrap().set_len(self.random.next() % size).unwrap(),
            1 => fs::remove_file(&path).unwrap(),
            _ => flip(&path, self.random.next() % (size * 8)),
        }
        self.count("damaged records");
    }

    /// Damages the index while nobody has it open, and lets the store mend it.
    pub(super) fn damage_index(&mut self) {
        self.close();
        let path = self.root.join("index.sqlite");
        let size = fs::metadata(&path).unwrap().len();
        match self.random.below(5) {
            0 => fs::remove_file(&path).unwrap(),
            1 => OpenOptions::new().write(true).open(&path).unwrap().set_len(self.random.next() % size).unwrap(),
            2 => fs::write(&path, b"no database").unwrap(),
            _ => {
                for _ in 0..=self.random.below(20) {
                    flip(&path, self.random.next() % (size * 8));
                }
            }
        }
        self.open();
        // Before it is mended, whatever is found is right; not all need be.
        for _ in 0..3 {
            let (n, query) = self.prompts.first().cloned().unwrap_or((0, vec![1]));
            let _ = restore(self.store(), &space(n), &query);
        }
        let verified = self.store().verify(true).unwrap();
        assert!(verified.is_repaired);
        self.look_for_gone();
        assert_eq!(self.store().verify(false).unwrap().faults, Vec::<String>::new());
        self.count("damaged indices");
    }

    /// Puts while the disk fails.
    pub(super) fn fail(&mut self) {
        self.settle();
        let steps = [
            Step::Reserve,
            Step::Create,
            Step::Write,
            Step::Sync,
            Step::Rename,
            Step::FolderSync,
            Step::Index,
            Step::Unlink,
        ];
        let step = *self.random.pick(&steps);
        let root = self.root.clone();
        plan(&root, Some((step, self.random.below(3) as u32, *self.random.pick(&[28, 5]))));
        for _ in 0..=self.random.below(3) {
            self.put(true);
        }
        plan(&root, None);
        self.count("failing disks");
    }

    /// Leaves what a killed process leaves: a temporary file, a lock, a record that is not in the index.
    pub(super) fn leave_strays(&mut self) {
        self.settle();
        // Damaged records that nobody has met yet.
        self.store().verify(true).unwrap();
        self.close();
        fs::write(self.root.join("owners/00000000deadbeef.lock"), b"").unwrap();
        fs::write(self.root.join("tmp/00000000deadbeef-1-0000000000000001.tmp"), vec![7; 50_000]).unwrap();
        let files = self.record_files();
        if !files.is_empty() {
            let path = self.random.pick(&files);
            let name = path.file_name().unwrap().to_str().unwrap();
            fs::copy(path, path.with_file_name(format!("{}-0000000000000001.safetensors", &name[..64]))).unwrap();
        }
        self.open();
        self.look_for_gone();
        assert_eq!(fs::read_dir(self.root.join("tmp")).unwrap().count(), 0);
        assert_eq!(fs::read_dir(self.root.join("owners")).unwrap().count(), 1);
        assert_eq!(self.store().verify(false).unwrap().faults, Vec::<String>::new());
        self.count("strays");
    }
}

fn flip(path: &Path, bit: u64) {
    let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, bit / 8).unwrap();
    byte[0] ^= 1 << (bit % 8);
    file.write_all_at(&byte, bit / 8).unwrap();
}
