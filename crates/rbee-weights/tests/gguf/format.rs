//! GGUF headers, sound and hostile: an error or an index whose tensors all lie where they may.

use proptest::prelude::*;
use rbee_weights::Error;
use rbee_weights::gguf::{GgmlType, Gguf, MAX_TENSORS, Split, check_split};

use rbee_testkit::gguf::{File, Tensor, Value, array, text};

fn parse(bytes: &[u8]) -> Result<Gguf<'_>, Error> {
    Gguf::parse("f.gguf", bytes, bytes.len() as u64)
}

fn sound() -> File {
    File::new()
        .key("general.architecture", "llama")
        .key("a.small", Value::U8(7))
        .key("a.signed", Value::I32(-1))
        .key("a.switch", Value::Bool(true))
        .key("a.double", Value::F64(0.1))
        .key("a.single", 0.25f32)
        .key("a.texts", Value::Texts(vec!["eins".into(), String::new(), "drei".into()]))
        .key("a.scores", Value::F32s(vec![-1.0, 2.5]))
        .key("a.types", Value::I32s(vec![1, -2, 3]))
        .tensor("q", &[64, 3], 8, &[1; 34 * 2 * 3])
        .f32("plain", &[5], &[1.0, 2.0, 3.0, 4.0, 5.0])
        .tensor("stacked", &[256, 2, 3], 12, &[2; 144 * 6])
}

#[test]
fn a_sound_file_is_read() {
    for version in [2, 3] {
        let bytes = File { version, ..sound() }.bytes();
        let gguf = parse(&bytes).unwrap();
        assert_eq!(gguf.str("general.architecture").unwrap(), Some("llama"));
        assert_eq!(gguf.u64("a.small").unwrap(), Some(7));
        assert_eq!(gguf.bool("a.switch").unwrap(), Some(true));
        assert_eq!((gguf.f64("a.double").unwrap(), gguf.f64("a.single").unwrap()), (Some(0.1), Some(0.25)));
        assert_eq!((gguf.f32("a.single").unwrap(), gguf.f32("a.none").unwrap()), (Some(0.25), None));
        let texts = gguf.strings("a.texts").unwrap().unwrap();
        assert_eq!(texts.len(), 3);
        assert_eq!(texts.collect::<Result<Vec<_>, _>>().unwrap(), ["eins", "", "drei"]);
        assert_eq!(gguf.f32s("a.scores").unwrap().unwrap().collect::<Vec<_>>(), [-1.0, 2.5]);
        assert_eq!(gguf.i32s("a.types").unwrap().unwrap().collect::<Vec<_>>(), [1, -2, 3]);
        assert_eq!(gguf.count("a.texts").unwrap(), Some(3));
        assert_eq!(gguf.keys().count(), 9);
        let stacked = &gguf.tensors["stacked"];
        assert_eq!((stacked.kind, &stacked.shape[..], stacked.len), (GgmlType::Q4_K, &[3, 2, 256][..], 144 * 6));
        assert_eq!(gguf.data(stacked).unwrap(), [2; 144 * 6]);
        assert_eq!(gguf.tensors["q"].shape, [3, 64]);
        assert_eq!(gguf.tensors["q"].start % 32, 0);
        assert_eq!(gguf.data(&gguf.tensors["plain"]).unwrap()[16..], 5f32.to_le_bytes());
    }
}

#[test]
fn a_header_without_its_tensors_bytes_is_enough() {
    let bytes = sound().bytes();
    let whole = parse(&bytes).unwrap();
    let header = whole.tensors.values().map(|tensor| tensor.start).min().unwrap() as usize;
    let gguf = Gguf::parse("f.gguf", &bytes[..header], bytes.len() as u64).unwrap();
    assert_eq!(gguf.tensors, whole.tensors);
    assert_eq!(gguf.data(&gguf.tensors["q"]), None);
}

#[test]
fn a_value_of_another_type_is_an_error() {
    let bytes = sound().key("a.wrong", Value::Raw(7, vec![2])).key("a.bytes", Value::Text(vec![0xff])).bytes();
    let gguf = parse(&bytes).unwrap();
    for error in [
        gguf.u64("a.signed").unwrap_err(),
        gguf.u64("a.types").unwrap_err(),
        gguf.u64("a.single").unwrap_err(),
        gguf.f64("a.small").unwrap_err(),
        gguf.f32("a.double").unwrap_err(),
        gguf.bool("a.wrong").unwrap_err(),
        gguf.str("a.texts").unwrap_err(),
        gguf.strings("a.types").unwrap_err(),
        gguf.strings("general.architecture").unwrap_err(),
        gguf.f32s("a.types").unwrap_err(),
        gguf.i32s("a.scores").unwrap_err(),
        gguf.count("a.small").unwrap_err(),
    ] {
        assert!(error.to_string().contains("must be"), "{error}");
    }
    assert!(gguf.str("a.bytes").unwrap_err().to_string().contains("UTF-8"));
    let mut raw = Vec::new();
    array(&mut raw, 8, 2);
    text(&mut raw, b"good");
    text(&mut raw, &[b'a', 0xc3]);
    let bytes = File::new().key("a", Value::Raw(9, raw)).bytes();
    let gguf = parse(&bytes).unwrap();
    let texts: Vec<_> = gguf.strings("a").unwrap().unwrap().collect();
    assert!(texts[0].is_ok() && texts[1].as_ref().unwrap_err().to_string().contains("UTF-8"));
}

#[test]
fn a_file_that_ends_early_is_refused_wherever_it_ends() {
    let bytes = sound().bytes();
    for len in 0..bytes.len() {
        assert!(parse(&bytes[..len]).is_err(), "{len} of {} bytes", bytes.len());
        // The rest of the file is no excuse for a header that ends.
        if let Ok(gguf) = Gguf::parse("f.gguf", &bytes[..len], bytes.len() as u64) {
            assert!(gguf.tensors.values().any(|tensor| gguf.data(tensor).is_none()), "{len}");
        }
    }
    parse(&bytes).unwrap();
}

fn tensor(name: &str, dims: &[u64], kind: u32, offset: u64) -> Tensor {
    Tensor { name: name.into(), dims: dims.into(), kind, offset }
}

fn with_tensors(tensors: Vec<Tensor>) -> File {
    File { tensors, data: vec![0; 1024], ..File::new() }
}

fn array_of(kind: u32, items: u64, rest: &[u8]) -> Value {
    let mut raw = Vec::new();
    array(&mut raw, kind, items);
    raw.extend_from_slice(rest);
    Value::Raw(9, raw)
}

#[test]
fn hostile_headers_are_refused() {
    let new = File::new;
    let mut endless = Vec::new();
    endless.extend(u64::MAX.to_le_bytes());
    let long = "n".repeat(513);
    let cases = vec![
        ("no magic", File { magic: *b"ggjt", ..sound() }, "does not begin"),
        ("version 0", File { version: 0, ..sound() }, "version 0"),
        ("alignment 0", sound().key("general.alignment", 0), "no power of two"),
        ("alignment 3", sound().key("general.alignment", 3), "no power of two"),
        ("alignment 4", sound().key("general.alignment", 4), "no power of two"),
        ("alignment 2^21", sound().key("general.alignment", 1 << 21), "no power of two"),
        ("alignment 2^31", sound().key("general.alignment", 1 << 31), "no power of two"),
        ("alignment of text", sound().key("general.alignment", "32"), "must be a u32"),
        ("alignment of i32", sound().key("general.alignment", Value::I32(32)), "must be a u32"),
        ("alignment of u16", sound().key("general.alignment", Value::U16(32)), "must be a u32"),
        ("alignment in an array", sound().key("general.alignment", Value::I32s(vec![32])), "no array"),
        ("a flood of keys", File { claims: (None, Some(1 << 40)), ..sound() }, "metadata keys, more than"),
        ("one key too many", File { claims: (None, Some(10)), ..sound() }, "its header ends"),
        ("one tensor too many", File { claims: (Some(4), None), data: Vec::new(), ..sound() }, "its header ends"),
        ("a key twice", sound().key("a.small", 7), "`a.small` stands twice"),
        ("a key of bad UTF-8", File { keys: vec![(vec![0xff], Value::U8(0))], ..new() }, "UTF-8"),
        ("a long key", new().key(&long, 7), "longer than 512"),
        ("an unknown type", new().key("a", Value::Raw(13, vec![0; 8])), "type 13"),
        ("an array of an unknown type", new().key("a", array_of(99, 0, &[])), "type 99"),
        ("an array longer than the file", new().key("a", array_of(6, 4096, &[0; 64])), "its header ends"),
        ("an array of endless texts", new().key("a", array_of(8, 1 << 24, &[0; 64])), "its header ends"),
        ("a text longer than the file", new().key("a", array_of(8, 2, &endless)), "its header ends"),
        ("an endless text", new().key("a", Value::Raw(8, endless)), "its header ends"),
        ("an array of 64 Mi", new().key("a", array_of(0, 64 << 20, &[0; 64])), "more than 16777216"),
        ("an endless array", new().key("a", array_of(12, u64::MAX, &[])), "more than 16777216"),
        ("a tensor twice", with_tensors(vec![tensor("a", &[8], 0, 0), tensor("a", &[8], 0, 32)]), "stands twice"),
        ("overlap", with_tensors(vec![tensor("a", &[9], 0, 0), tensor("b", &[8], 0, 32)]), "`a` and `b` overlap"),
        ("the same bytes", with_tensors(vec![tensor("a", &[8], 0, 0), tensor("b", &[8], 0, 0)]), "overlap"),
        ("one within", with_tensors(vec![tensor("a", &[64], 0, 0), tensor("b", &[8], 0, 64)]), "overlap"),
        ("not aligned", with_tensors(vec![tensor("a", &[8], 0, 8)]), "no multiple of 32"),
        ("past the end", with_tensors(vec![tensor("a", &[8], 0, 1024)]), "cut short"),
        ("one value past the end", with_tensors(vec![tensor("a", &[257], 0, 0)]), "cut short"),
        ("at the end of numbers", with_tensors(vec![tensor("a", &[8], 0, u64::MAX - 31)]), "cut short"),
        ("near it", with_tensors(vec![tensor("a", &[8], 0, u64::MAX - 1023)]), "cut short"),
        ("a shape past all numbers", with_tensors(vec![tensor("a", &[1 << 32, 1 << 32], 0, 0)]), "impossible shape"),
        ("bytes past all numbers", with_tensors(vec![tensor("a", &[1 << 62], 0, 0)]), "impossible shape"),
        ("blocks past all numbers", with_tensors(vec![tensor("a", &[u64::MAX - 31], 8, 0)]), "impossible shape"),
        ("no values", with_tensors(vec![tensor("a", &[8, 0], 0, 0)]), "impossible shape"),
        ("no values at all", with_tensors(vec![tensor("a", &[0, u64::MAX, u64::MAX], 0, 0)]), "impossible shape"),
        ("five dimensions", with_tensors(vec![tensor("a", &[1; 5], 0, 0)]), "5 dimensions"),
        ("half a block", with_tensors(vec![tensor("a", &[48], 2, 0)]), "rows of 48, no multiple of 32"),
        ("blocks across rows", with_tensors(vec![tensor("a", &[128, 2], 12, 0)]), "rows of 128, no multiple of 256"),
        ("an unknown kind", with_tensors(vec![tensor("a", &[8], 250, 0)]), "kind 250, which there is not"),
        ("a long name", with_tensors(vec![tensor(&long, &[8], 0, 0)]), "longer than 512"),
        (
            "a name of bad UTF-8",
            with_tensors(vec![Tensor { name: vec![0xfe], ..tensor("", &[8], 0, 0) }]),
            "name is not valid UTF-8",
        ),
    ];
    for (case, file, want) in cases {
        let error = parse(&file.bytes()).err().unwrap_or_else(|| panic!("{case} was read"));
        assert!(matches!(error, Error::Corrupt { .. }), "{case}: {error:?}");
        assert!(error.to_string().contains(want), "{case}: {error}");
    }
}

#[test]
fn what_is_not_read_here_is_named_with_what_to_take() {
    for (file, want) in [
        (File { version: 1, ..sound() }, "version 1"),
        (File { version: 4, ..sound() }, "version 4"),
        (File { version: 3u32.swap_bytes(), ..sound() }, "big-endian"),
        (sound().key("b", array_of(9, 1, &[0; 64])), "`b` has arrays in an array"),
    ] {
        let error = parse(&file.bytes()).unwrap_err();
        assert!(matches!(error, Error::Unsupported { .. }) && error.to_string().contains(want), "{error:?}");
    }
    let kinds: Vec<u32> = GgmlType::ALL.into_iter().map(GgmlType::number).collect();
    for (number, name) in [(16, "IQ2_XXS"), (20, "IQ4_NL"), (23, "IQ4_XS"), (35, "TQ2_0"), (39, "MXFP4"), (9, "Q8_1")]
        .into_iter()
        .chain([(15, "Q8_K"), (24, "I8"), (28, "F64"), (31, "Q4_0_4_4")])
    {
        assert!(!kinds.contains(&number));
        let error = parse(&with_tensors(vec![tensor("a", &[256], number, 0)]).bytes()).unwrap_err();
        let message = error.to_string();
        assert!(matches!(error, Error::Unsupported { .. }), "{message}");
        assert!(message.contains(name) && message.contains("take a Q4_K_M or Q8_0 file of this model"), "{message}");
    }
}

#[test]
fn sizes_are_those_of_the_formats_blocks() {
    for kind in GgmlType::ALL {
        let bytes = (kind.block_bytes() * 2 * 3) as usize;
        let file = File::new().tensor("a", &[kind.block() * 2, 3], kind.number(), &vec![0; bytes]).bytes();
        assert_eq!(parse(&file).unwrap().tensors["a"].len, bytes as u64);
        assert!(parse(&file[..file.len() - 1]).is_err(), "{kind:?}");
    }
    let bits = |kind: GgmlType| kind.block_bytes() as f64 * 8.0 / kind.block() as f64;
    assert_eq!(GgmlType::ALL.map(bits), [32.0, 16.0, 16.0, 4.5, 5.0, 5.5, 6.0, 8.5, 2.625, 3.4375, 4.5, 5.5, 6.5625]);
}

#[test]
fn another_alignment_is_kept_to() {
    for alignment in [8u64, 64, 4096] {
        let mut file = File { alignment, ..File::new() }.key("general.alignment", alignment as u32);
        file = file.f32("a", &[3], &[1.0, 2.0, 3.0]).f32("b", &[1], &[4.0]);
        let bytes = file.bytes();
        let gguf = parse(&bytes).unwrap();
        assert_eq!(gguf.data(&gguf.tensors["b"]).unwrap(), 4f32.to_le_bytes());
        assert_eq!(gguf.tensors["b"].start - gguf.tensors["a"].start, alignment.max(16));
    }
}

#[test]
fn floods_are_refused_before_they_are_read() {
    let mut tensors = File::new().bytes();
    tensors[8..16].copy_from_slice(&1_500_000u64.to_le_bytes());
    tensors.resize(64 << 20, 0);
    assert!(parse(&tensors).unwrap_err().to_string().contains("1500000 tensors, more than"));
    // The bytes of the values are all there.
    let items = array_of(0, 64 << 20, &vec![0; 64 << 20]);
    assert!(parse(&File::new().key("a", items).bytes()).unwrap_err().to_string().contains("more than"));
}

#[test]
fn as_many_tensors_as_may_be_are_read() {
    let mut file = File { data: vec![0; 32 * MAX_TENSORS as usize], ..File::new() };
    file.tensors = (0..MAX_TENSORS).map(|i| tensor(&format!("blk.{i}.weight"), &[8], 0, i * 32)).collect();
    assert_eq!(parse(&file.bytes()).unwrap().tensors.len() as u64, MAX_TENSORS);
    file.tensors.push(tensor("more", &[8], 0, 0));
    assert!(parse(&file.bytes()).is_err());
}

fn part(no: u16, count: u16, tensors: i32, names: &[&str]) -> Vec<u8> {
    let file = File::new().key("split.no", Value::U16(no)).key("split.count", Value::U16(count));
    let file = file.key("split.tensors.count", Value::I32(tensors));
    names.iter().fold(file, |file, name| file.f32(name, &[1], &[0.0])).bytes()
}

#[test]
fn the_files_of_a_split_model_are_all_there_and_in_order() {
    let (one, two, three) = (part(0, 3, 3, &["a"]), part(1, 3, 3, &["b"]), part(2, 3, 3, &["c"]));
    let check = |files: &[&[u8]]| check_split(&files.iter().map(|bytes| parse(bytes).unwrap()).collect::<Vec<_>>());
    assert_eq!(parse(&two).unwrap().split().unwrap(), Some(Split { no: 1, count: 3, tensors: 3 }));
    check(&[&one, &two, &three]).unwrap();
    let alone = sound().bytes();
    check(&[&alone]).unwrap();
    check(&[&part(0, 1, 1, &["a"])]).unwrap();
    for (files, want) in [
        (&[][..], "a GGUF file is missing"),
        (&[&one[..]], "part 2 of the 3"),
        (&[&one, &two], "part 3 of the 3"),
        (&[&two, &one, &three], "is part 2 of 3, and part 1 was due"),
        (&[&one, &one, &two, &three], "is part 1 of 3, and part 2 was due"),
        (&[&one, &part(1, 3, 3, &["a"]), &three], "`a` stands in another file too"),
        (&[&one, &part(1, 2, 3, &["b"]), &three], "not of the model"),
        (&[&one, &part(1, 3, 9, &["b"]), &three], "not of the model"),
        (&[&one, &alone, &three], "not of the model"),
        (&[&one, &part(1, 3, 3, &["b", "d"]), &three], "claims 3 tensors, its 3 files have 4"),
        (&[&alone, &alone], "is part 1 of 1, and part 2 was due"),
    ] {
        let error = check(files).unwrap_err().to_string();
        assert!(error.contains(want), "{want}: {error}");
    }
    for bytes in [part(3, 3, 3, &["a"]), File::new().key("split.no", Value::U16(0)).bytes()] {
        assert!(parse(&bytes).unwrap().split().is_err());
    }
}

fn check_bounds(bytes: &[u8]) -> Result<(), TestCaseError> {
    let Ok(gguf) = parse(bytes) else { return Ok(()) };
    let mut spans: Vec<(u64, u64)> = Vec::new();
    for (name, tensor) in &gguf.tensors {
        let count: u64 = tensor.shape.iter().map(|size| *size as u64).product();
        prop_assert_eq!(tensor.len, count / tensor.kind.block() * tensor.kind.block_bytes(), "{}", name);
        prop_assert!(gguf.data(tensor).is_some_and(|data| data.len() as u64 == tensor.len));
        spans.push((tensor.start, tensor.start + tensor.len));
    }
    spans.sort_unstable();
    prop_assert!(spans.is_sorted_by(|one, next| one.1 <= next.0), "{spans:?}");
    for key in gguf.keys() {
        let _ = (gguf.u64(key), gguf.f32(key), gguf.f64(key), gguf.bool(key), gguf.str(key), gguf.count(key));
        if let Ok(Some(texts)) = gguf.strings(key) {
            prop_assert_eq!(texts.len(), texts.count());
        }
        let _ =
            (gguf.f32s(key).map(|all| all.map(Iterator::count)), gguf.i32s(key).map(|all| all.map(Iterator::count)));
    }
    let _ = check_split(&[gguf]);
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(20_000))]

    #[test]
    fn changed_bytes_are_an_error_or_an_index_in_bounds(
        changes in prop::collection::vec((any::<prop::sample::Index>(), prop_oneof![
            any::<u8>().prop_map(|byte| vec![byte]),
            any::<u64>().prop_map(|number| number.to_le_bytes().to_vec()),
            (0u64..300).prop_map(|number| number.to_le_bytes().to_vec()),
            (0u32..42).prop_map(|number| number.to_le_bytes().to_vec()),
        ]), 1..4),
        cut in prop::option::weighted(0.2, any::<prop::sample::Index>()),
    ) {
        let mut bytes = sound().bytes();
        // What comes after the infos is not looked at.
        let header = parse(&bytes).unwrap().tensors.values().map(|tensor| tensor.start).min().unwrap() as usize;
        for (at, with) in changes {
            let at = at.index(header);
            bytes[at..at + with.len()].copy_from_slice(&with);
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        check_bounds(&bytes)?;
    }

    #[test]
    fn placed_at_will_tensors_are_an_error_or_in_bounds(
        places in prop::collection::vec(
            (1u64..40, 1u64..4, 0u64..20, prop::sample::select(vec![0u32, 1, 2, 8, 12])),
            1..5,
        ),
        len in 0usize..800,
    ) {
        let infos = places.iter().enumerate();
        let infos = infos.map(|(i, (row, rows, at, kind))| tensor(&format!("{i}"), &[row * 32, *rows], *kind, at * 32));
        check_bounds(&File { tensors: infos.collect(), data: vec![0; len * 32], ..File::new() }.bytes())?;
    }
}
