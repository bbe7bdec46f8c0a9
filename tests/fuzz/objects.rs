//! Calls about the library and models.

use std::ffi::{CStr, CString, c_char, c_void};
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

use vattn::ffi::vattn_status::{self, *};
use vattn::ffi::{
    self, vattn_cuda_device, vattn_cuda_options, vattn_error, vattn_geometry_info, vattn_layers,
};

use super::asking::parse;
use super::room::{Expect, Room, WRONG};
use super::source::Source;
use super::voice::{call, handle};
use super::world::{Crowd, Geometry, World};

static TOLD: AtomicU64 = AtomicU64::new(0);

/// A log callback that does what it must not: it calls the library.
unsafe extern "C" fn told(user: *mut c_void, level: i32, target: *const c_char, text: *const c_char) {
    assert!(user.is_null() && (1..=5).contains(&level));
    // SAFETY: both end with a NUL and live until this returns.
    let (target, text) = unsafe { (CStr::from_ptr(target), CStr::from_ptr(text)) };
    assert!(target.to_bytes().starts_with(b"vattn") && !text.is_empty());
    if TOLD.fetch_add(1, SeqCst).is_multiple_of(64) {
        // SAFETY: NULL may be passed.
        let status = unsafe { ffi::vattn_driver_describe(std::ptr::null(), std::ptr::null_mut()) };
        assert_eq!(status, VATTN_IN_CALLBACK);
    }
}

/// A text, and what is wrong with it.
fn text(s: &mut impl Source, expect: &mut Expect, good: &[&str], unknown: vattn_status) -> Option<CString> {
    if !s.one_in(6) {
        return Some(CString::new(s.pick(good)).unwrap());
    }
    match s.below(4) {
        0 => {
            expect.spoil(VATTN_INVALID_ARGUMENT);
            None
        }
        1 => {
            expect.spoil(VATTN_INVALID_ARGUMENT);
            Some(CString::new(b"ab\xff\xfe".to_vec()).unwrap())
        }
        2 => {
            expect.spoil(unknown);
            Some(CString::new("x".repeat(s.index(70_000))).unwrap())
        }
        _ => {
            expect.spoil(unknown);
            Some(CString::new(["", "{", "[1]", "{}", "{\"hidden_size\":-1}"][s.index(5)]).unwrap())
        }
    }
}

fn first(text: Option<&CString>) -> *const c_char {
    text.map_or(std::ptr::null(), |text| text.as_ptr())
}

fn dtype(s: &mut impl Source, expect: &mut Expect) -> i32 {
    if s.one_in(WRONG) {
        expect.spoil(VATTN_INVALID_ARGUMENT);
        s.no_choice()
    } else {
        i32::try_from(s.below(8)).unwrap()
    }
}

fn ranks(s: &mut impl Source, expect: &mut Expect) -> u32 {
    if !s.one_in(12) {
        return if s.one_in(8) { 2 } else { 1 };
    }
    // Some models can be split so.
    for status in [VATTN_INVALID_GEOMETRY, VATTN_INVALID_ARGUMENT, VATTN_INVALID_CONFIG] {
        expect.may(status);
    }
    s.pick(&[0, 3, 7, 1_000_003])
}

impl World {
    pub(crate) fn library(&mut self, s: &mut impl Source) {
        match s.below(8) {
            0 => {
                let number = if s.one_in(2) { s.no_choice() } else { i32::try_from(s.below(30)).unwrap() };
                // SAFETY: the library's string, which lives as long as it.
                let name = unsafe { CStr::from_ptr(ffi::vattn_status_name(number)) };
                assert!(!name.is_empty());
                self.voice
                    .count("vattn_status_name", if name == c"unknown" { "unknown" } else { "VATTN_OK" });
            }
            1 => {
                assert_eq!(ffi::vattn_abi_version(), ffi::VATTN_ABI_VERSION);
                // SAFETY: likewise.
                let version = unsafe { CStr::from_ptr(ffi::vattn_version()) };
                assert_eq!(version.to_str().unwrap().split('.').count(), 3);
                self.voice.count("vattn_abi_version", "VATTN_OK");
                self.voice.count("vattn_version", "VATTN_OK");
            }
            2 => self.last_error(s),
            3 => self.log(s),
            4 if s.one_in(8) => {
                let mut expect = Expect::default();
                let mut room = Room::new::<*mut c_char>(s, &mut expect);
                let status = call!(self, vattn_probe_json(room.at()));
                room.check(status);
                self.judge(status, &expect, &[VATTN_OK]);
                self.keep_text(status, &room);
            }
            4 => {
                let mut expect = Expect::default();
                let mut room = Room::new::<*mut c_char>(s, &mut expect);
                let status = call!(self, vattn_catalog_json(room.at()));
                room.check(status);
                self.judge(status, &expect, &[VATTN_OK]);
                self.keep_text(status, &room);
            }
            5 if s.one_in(8) => self.cuda(s),
            _ => self.string_destroy(s),
        }
    }

    fn last_error(&mut self, s: &mut impl Source) {
        let mut expect = Expect::default();
        let mut room = Room::sized::<vattn_error>(s, &mut expect);
        // SAFETY: NULL, misaligned, or a struct of the size that it states.
        let status = unsafe { ffi::vattn_last_error(room.at()) };
        self.voice.count("vattn_last_error", &format!("{status:?}"));
        room.check(status);
        self.judge(status, &expect, &[VATTN_OK]);
        let mut expect = Expect::default();
        let capacity = s.index(100);
        let mut room = Room::array::<u8>(s, &mut expect, capacity);
        // SAFETY: NULL, which is refused, or so many bytes.
        let length = unsafe { ffi::vattn_last_error_message(room.at(), capacity) };
        let is_empty = capacity == 0 || !expect.is_good();
        room.check(if is_empty { VATTN_INVALID_ARGUMENT } else { VATTN_OK });
        self.voice.count("vattn_last_error_message", if is_empty { "no room" } else { "VATTN_OK" });
        assert!(length >= self.voice.last().len().min(8191));
        assert!(is_empty || room.byte(length.min(capacity - 1)) == 0, "it ends with a NUL");
    }

    fn log(&mut self, s: &mut impl Source) {
        let mut expect = Expect::default();
        let level = if s.one_in(4) {
            expect.spoil(VATTN_INVALID_ARGUMENT);
            s.no_choice()
        } else {
            // Little is told of the most talkative levels, or all would be slow.
            if s.one_in(16) { 5 } else { i32::try_from(s.below(3)).unwrap() }
        };
        let callback: ffi::vattn_log_callback = if s.one_in(2) { Some(told) } else { None };
        let status = call!(self, vattn_log_set(callback, std::ptr::null_mut::<c_void>(), level));
        self.judge(status, &expect, &[VATTN_OK]);
    }

    pub(crate) fn cuda(&mut self, s: &mut impl Source) {
        // Of a machine with a GPU, or without.
        let found = [VATTN_OK, VATTN_UNSUPPORTED, VATTN_DRIVER, VATTN_INVALID_ARGUMENT];
        let mut expect = Expect::default();
        match s.below(3) {
            0 => {
                let mut room = Room::new::<u32>(s, &mut expect);
                let status = call!(self, vattn_cuda_device_count(room.at()));
                room.check(status);
                self.judge(status, &expect, &found);
            }
            1 => {
                let mut room = Room::sized::<vattn_cuda_device>(s, &mut expect);
                let status = call!(self, vattn_cuda_device_describe(s.pick(&[0, 1, u32::MAX]), room.at()));
                room.check(status);
                self.judge(status, &expect, &found);
            }
            _ => {
                let size = size_of::<vattn_cuda_options>();
                let mut options = vattn_cuda_options {
                    struct_size: size,
                    ordinal: -1,
                    exportable: 0,
                    rdma: 0,
                    reserved: 0,
                };
                if s.one_in(3) {
                    options.ordinal = s.no_choice();
                    options.rdma = 7;
                    expect.spoil(VATTN_INVALID_ARGUMENT);
                    expect.spoil(VATTN_UNSUPPORTED);
                }
                let mut room = Room::new::<usize>(s, &mut expect);
                let status = call!(self, vattn_driver_create_cuda(&raw const options, room.at()));
                room.check(status);
                self.judge(status, &expect, &found);
                if status == VATTN_OK {
                    let status = call!(self, vattn_driver_destroy(handle(room.get::<usize>())));
                    assert_eq!(status, VATTN_OK);
                }
            }
        }
    }

    /// A text that the library gave out.
    pub(crate) fn keep_text(&mut self, status: vattn_status, room: &Room) {
        if status != VATTN_OK {
            return;
        }
        let string: usize = room.get();
        assert!(parse(room).is_object());
        self.strings.push(string);
        if self.strings.len() > 8 {
            let status = call!(self, vattn_string_destroy(handle(self.strings.remove(0))));
            assert_eq!(status, VATTN_OK);
        }
    }

    fn string_destroy(&mut self, s: &mut impl Source) {
        let mut expect = Expect::default();
        let string = if self.strings.is_empty() || s.one_in(3) {
            // No address of a string.
            let garbage = usize::try_from(s.any_number()).unwrap() | 1;
            let garbage = if s.one_in(3) { 0 } else { garbage };
            if garbage != 0 {
                expect.spoil(VATTN_INVALID_HANDLE);
            }
            garbage
        } else {
            let at = s.index(self.strings.len());
            self.strings.swap_remove(at)
        };
        let status = call!(self, vattn_string_destroy(handle(string)));
        self.judge(status, &expect, &[VATTN_OK]);
        if string != 0 && status == VATTN_OK && self.crowd == Crowd::None {
            let again = call!(self, vattn_string_destroy(handle(string)));
            assert_eq!(again, VATTN_INVALID_HANDLE, "given up twice");
        }
    }

    pub(crate) fn geometry_create(&mut self, s: &mut impl Source) {
        let mut expect = Expect::default();
        let mut room = Room::new::<usize>(s, &mut expect);
        let sure = [VATTN_OK];
        let unsure = [VATTN_OK, VATTN_INVALID_GEOMETRY];
        let status = match s.below(8) {
            0 => {
                let names = ["llama-3-8b", "yi-6b", "no-such-model", "llama-3-70b"];
                let name = text(s, &mut expect, &names, VATTN_INVALID_ARGUMENT);
                let (ranks, dtype) = (ranks(s, &mut expect), dtype(s, &mut expect));
                if name.as_deref().is_some_and(|name| !name.to_bytes().starts_with(b"llama")) {
                    // Which names there are is not for this test to know.
                    expect.spoil(VATTN_INVALID_ARGUMENT);
                    expect.spoil(VATTN_INVALID_GEOMETRY);
                }
                let name = first(name.as_ref());
                let status = call!(self, vattn_geometry_create_preset(name, ranks, dtype, room.at()));
                if status == VATTN_OK {
                    expect = Expect::default();
                }
                self.judge(status, &expect, &unsure);
                status
            }
            1 => {
                let json = "{\"model_type\":\"llama\",\"num_hidden_layers\":3,\"num_attention_heads\":4,\
                            \"num_key_value_heads\":2,\"hidden_size\":64,\"torch_dtype\":\"float16\"}";
                let json = text(s, &mut expect, &[json], VATTN_INVALID_GEOMETRY);
                let (ranks, dtype) = (ranks(s, &mut expect), dtype(s, &mut expect));
                let json = first(json.as_ref());
                let status = call!(self, vattn_geometry_create_from_hf_config(json, ranks, dtype, room.at()));
                self.judge(status, &expect, &unsure);
                status
            }
            _ => {
                let mut groups: Vec<vattn_layers> = Vec::new();
                for _ in 0..=s.below(3) {
                    let (layers, dim) = (1 + s.small(3), 8 * (1 + s.small(6)));
                    groups.push(if s.one_in(5) {
                        vattn_layers { layers, kv_heads: 0, key_dim: dim, value_dim: 0 }
                    } else {
                        let value_dim = if s.one_in(4) { dim + 8 } else { dim };
                        vattn_layers { layers, kv_heads: 1 + s.small(3), key_dim: dim, value_dim }
                    });
                }
                let ranks = ranks(s, &mut expect);
                let mut natural = if ranks == 1 { &sure[..] } else { &unsure[..] };
                if s.one_in(WRONG) {
                    let group = &mut groups[0];
                    let field = s.pick(&[0, 1, 2, 3]);
                    let value = s.pick(&[0, u32::MAX, 65_537]);
                    match field {
                        0 => group.layers = value,
                        1 => group.kv_heads = value,
                        2 => group.key_dim = value,
                        _ => group.value_dim = value,
                    }
                    natural = &unsure;
                }
                let dtype = dtype(s, &mut expect);
                let (mut at, mut count) = (groups.as_ptr(), groups.len());
                if s.one_in(WRONG) {
                    (at, count) = s.pick(&[
                        (std::ptr::null(), 0),
                        (std::ptr::null(), usize::MAX),
                        (std::ptr::null(), 3),
                    ]);
                    expect.spoil(if count == 0 { VATTN_INVALID_GEOMETRY } else { VATTN_INVALID_ARGUMENT });
                }
                let status = call!(self, vattn_geometry_create(at, count, ranks, dtype, room.at()));
                self.judge(status, &expect, natural);
                status
            }
        };
        room.check(status);
        if status == VATTN_OK {
            let handle: usize = room.get();
            self.geometries.push(Geometry { handle, layers: 0, bytes_per_token: 0 });
            let info = self.describe_geometry(handle);
            let geometry = self.geometries.last_mut().unwrap();
            (geometry.layers, geometry.bytes_per_token) =
                info.map_or((0, 0), |info| (info.layers, info.bytes_per_token));
        }
    }

    fn describe_geometry(&mut self, geometry: usize) -> Option<vattn_geometry_info> {
        let mut info = vattn_geometry_info {
            struct_size: size_of::<vattn_geometry_info>(),
            layers: 0,
            dtype: 0,
            bytes_per_token: 0,
        };
        let status = call!(self, vattn_geometry_describe(handle(geometry), &raw mut info));
        assert!(status == VATTN_OK || self.crowd == Crowd::Wild);
        (status == VATTN_OK).then_some(info)
    }

    pub(crate) fn geometry_ask(&mut self, s: &mut impl Source) {
        let mut expect = Expect::default();
        let (geometry, at) = self.geometry(s, &mut expect);
        let layers = at.map_or(1, |at| self.geometries[at].layers);
        let status = match s.below(3) {
            0 => {
                let mut room = Room::sized::<vattn_geometry_info>(s, &mut expect);
                let status = call!(self, vattn_geometry_describe(handle(geometry), room.at()));
                room.check(status);
                status
            }
            1 => {
                let layer = if s.one_in(8) { s.pick(&[layers, u32::MAX]) } else { s.small(layers.max(1)) };
                if layer >= layers {
                    expect.spoil(VATTN_INVALID_ARGUMENT);
                }
                let mut room = Room::new::<vattn_layers>(s, &mut expect);
                let status = call!(self, vattn_geometry_layer(handle(geometry), layer, room.at()));
                room.check(status);
                assert!(status != VATTN_OK || room.get::<vattn_layers>().layers == 1);
                status
            }
            _ => {
                let kernels =
                    ["fa3-decode", "fa3-causal", "fa3-window", "fa3-view", "torch-varlen", "flashinfer"];
                let kernel = text(s, &mut expect, &kernels, VATTN_INVALID_CONFIG);
                let mut room = Room::new::<u32>(s, &mut expect);
                let kernel = first(kernel.as_ref());
                let status = call!(self, vattn_geometry_tile_tokens(handle(geometry), kernel, room.at()));
                room.check(status);
                self.judge(status, &expect, &[VATTN_OK, VATTN_INVALID_CONFIG]);
                return;
            }
        };
        self.judge(status, &expect, &[VATTN_OK]);
    }

    pub(crate) fn geometry_destroy(&mut self, s: &mut impl Source) {
        let mut expect = Expect::default();
        let (geometry, at) = self.geometry(s, &mut expect);
        let status = call!(self, vattn_geometry_destroy(handle(geometry)));
        let expect = if geometry == 0 { Expect::default() } else { expect };
        self.judge(status, &expect, &[VATTN_OK]);
        if let Some(at) = at {
            self.geometries.swap_remove(at);
            self.dead.push(geometry);
        }
    }
}
